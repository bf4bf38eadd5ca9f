// What an x86 set's file includes before its target region: what these define is shared with other files, so
// none of it may be compiled for one set.
#pragma once

// GCC 12 finds "uninitialized" values inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels/latent_kernels.h"
#include "kernels/pair_kernels.h"
#include "kernels/quant_types.h"
#include "kernels/side_by_side.h"
#include "kernels/tile.h"
