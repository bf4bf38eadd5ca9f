// The algorithms of tile.h over vectors of kWidth numbers. Included once per instruction set, inside a
// namespace and the target region of isa/*.cpp; hence no include guard.

#define KVFOLD_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define KVFOLD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KVFOLD_UNROLL _Pragma("GCC unroll 16")
#endif

typedef float Vector __attribute__((vector_size(kWidth * 4)));
typedef float Loaded __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));  // anywhere in memory

constexpr int kLanes = 16;                   // of a dot, on every machine
constexpr int kParts = kLanes / kWidth;      // vectors that hold them
constexpr int kBlock = kWidth == 8 ? 2 : 4;  // vectors of a row of C in nn: as many as the registers hold

KVFOLD_INLINE Vector load(const float* p) { return *reinterpret_cast<const Loaded*>(p); }

// M rows of A by N rows of B.
template <int M, int N>
KVFOLD_INLINE void dots(const float* const* a, const float* b, int64_t ldb, int64_t k, float* c,
                        int64_t ldc) {
  Vector sum[M][N][kParts] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    KVFOLD_UNROLL for (int p = 0; p < kParts; p++) {
      Vector rows[N];
      KVFOLD_UNROLL for (int n = 0; n < N; n++) rows[n] = load(b + n * ldb + i + p * kWidth);
      KVFOLD_UNROLL for (int m = 0; m < M; m++) {
        const Vector row = load(a[m] + i + p * kWidth);
        KVFOLD_UNROLL for (int n = 0; n < N; n++) sum[m][n][p] += row * rows[n];
      }
    }
  }
  KVFOLD_UNROLL for (int m = 0; m < M; m++) {
    KVFOLD_UNROLL for (int n = 0; n < N; n++) {
      float lanes[kLanes];
      KVFOLD_UNROLL for (int p = 0; p < kParts; p++)
          std::memcpy(lanes + p * kWidth, &sum[m][n][p], kWidth * 4);
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
      }
      float total = lanes[0];
      for (int64_t rest = i; rest < k; rest++) total += a[m][rest] * b[n * ldb + rest];
      c[m * ldc + n] = total;
    }
  }
}

template <int M>
KVFOLD_INLINE void dot_rows(const float* const* a, const float* b, int64_t ldb, int64_t n, int64_t k,
                            float* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) dots<M, 4>(a, b + j * ldb, ldb, k, c + j, ldc);
  for (; j < n; j++) dots<M, 1>(a, b + j * ldb, ldb, k, c + j, ldc);
}

void nt(const float* a, int64_t lda, const int32_t* pick, int64_t m, const float* b, int64_t ldb, int64_t n,
        int64_t k, float* c, int64_t ldc) {
  const auto row = [&](int64_t i) { return a + (pick ? pick[i] : i) * lda; };
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    const float* rows[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
    dot_rows<4>(rows, b, ldb, n, k, c + i * ldc, ldc);
  }
  for (; i < m; i++) {
    const float* rows[1] = {row(i)};
    dot_rows<1>(rows, b, ldb, n, k, c + i * ldc, ldc);
  }
}

// M rows of C, N vectors of each.
template <int M, int N>
KVFOLD_INLINE void sums(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, float* c,
                        int64_t ldc) {
  Vector sum[M][N] = {};
  for (int64_t i = 0; i < k; i++) {
    Vector row[N];
    KVFOLD_UNROLL for (int n = 0; n < N; n++) row[n] = load(b + i * ldb + n * kWidth);
    KVFOLD_UNROLL for (int m = 0; m < M; m++) {
      const float factor = a[m * lda + i];
      KVFOLD_UNROLL for (int n = 0; n < N; n++) sum[m][n] += factor * row[n];
    }
  }
  KVFOLD_UNROLL for (int m = 0; m < M; m++) {
    KVFOLD_UNROLL for (int n = 0; n < N; n++) {
      *reinterpret_cast<Loaded*>(c + m * ldc + n * kWidth) += sum[m][n];
    }
  }
}

template <int M>
KVFOLD_INLINE void sum_rows(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t n, int64_t k,
                            float* c, int64_t ldc) {
  int64_t j = 0;
  for (; j + kBlock * kWidth <= n; j += kBlock * kWidth) sums<M, kBlock>(a, lda, b + j, ldb, k, c + j, ldc);
  for (; j + kWidth <= n; j += kWidth) sums<M, 1>(a, lda, b + j, ldb, k, c + j, ldc);
  for (; j < n; j++) {
    for (int m = 0; m < M; m++) {
      float total = 0.0f;
      for (int64_t i = 0; i < k; i++) total += a[m * lda + i] * b[i * ldb + j];
      c[m * ldc + j] += total;
    }
  }
}

void nn(const float* a, int64_t lda, int64_t m, const float* b, int64_t ldb, int64_t n, int64_t k, float* c,
        int64_t ldc) {
  int64_t i = 0;
  for (; i + 4 <= m; i += 4) sum_rows<4>(a + i * lda, lda, b, ldb, n, k, c + i * ldc, ldc);
  for (; i < m; i++) sum_rows<1>(a + i * lda, lda, b, ldb, n, k, c + i * ldc, ldc);
}

constexpr Tiles kTiles = {nt, nn};

#undef KVFOLD_INLINE
#undef KVFOLD_UNROLL
