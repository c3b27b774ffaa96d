// All that translated kernels use.
#pragma once

#include "engine/ptx_registry.h"
#include "ptx/runtime/arithmetic.h"
#include "ptx/runtime/bits.h"
#include "ptx/runtime/bulk_copies.h"
#include "ptx/runtime/conversions.h"
#include "ptx/runtime/memory.h"
#include "ptx/runtime/threads.h"
