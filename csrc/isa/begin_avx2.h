// The target region of a file that is compiled for AVX2, to the end of the file.
#pragma once

#include "isa/before_region.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
