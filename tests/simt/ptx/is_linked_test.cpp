// This program runs translated PTX, not the sources: a launch that finds no PTX version would end it.
#include <gtest/gtest.h>

#include "engine/ptx_registry.h"

namespace simt::ptx {
namespace {

TEST(Ptx, IsLinked) { EXPECT_GT(registered(), 0u); }

}  // namespace
}  // namespace simt::ptx
