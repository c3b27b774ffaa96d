// This program runs translated PTX, not the sources: a launch that finds no PTX version would end it.
#include <gtest/gtest.h>

#include "engine/ptx_registry.h"

namespace simt::ptx {
namespace {

TEST(Ptx, HasAllKernels) { EXPECT_EQ(registered(), 18u); }

}  // namespace
}  // namespace simt::ptx
