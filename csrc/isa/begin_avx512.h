// The target region of a file that is compiled for AVX-512, with or without tiles, to the end of the file.
#pragma once

#include "isa/before_region.h"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bf16")
