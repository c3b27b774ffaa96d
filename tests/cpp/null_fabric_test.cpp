#include "fabric/null_fabric.h"

#include <gtest/gtest.h>

#include <array>

namespace efa_ep {
namespace {

TEST(NullFabric, CompletesEveryWriteOnceAndIsBounded) {
  NullFabric fabric(2, 3);
  EXPECT_EQ(fabric.rails(), 2U);
  WriteRequest request;
  for (request.context = 10; request.context < 13; ++request.context) {
    EXPECT_EQ(fabric.post_write(request), PostResult::kPosted);
  }
  EXPECT_EQ(fabric.post_write(request), PostResult::kAgain);
  request.rail = 1;
  EXPECT_EQ(fabric.post_write(request), PostResult::kPosted);
  request.rail = 2;
  EXPECT_THROW(fabric.post_write(request), ConfigurationError);

  std::array<Completion, 3> completions;
  std::vector<uint64_t> contexts;
  while (const size_t count = fabric.poll(completions)) {
    for (size_t i = 0; i < count; ++i) {
      EXPECT_EQ(completions[i].kind, CompletionKind::kWriteDone);
      contexts.push_back(completions[i].context);
    }
  }
  EXPECT_EQ(contexts, (std::vector<uint64_t>{10, 11, 12, 13}));
}

}  // namespace
}  // namespace efa_ep
