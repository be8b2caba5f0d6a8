/* Multiply-adds of registers alone: what a core does in a second when nothing is loaded. floors.py compiles and times it. */

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
#define CHAINS 12 /* two units, four cycles each, and some to spare; with the two operands below, few enough registers */

typedef float vec __attribute__((vector_size(WIDTH)));

/* Returns how many floating-point operations it did; ``sink`` keeps the compiler from leaving them out. */
double multiply_add(long rounds, float *sink) {
  vec acc[CHAINS], a, b;
  for (int j = 0; j < (int)(WIDTH / sizeof(float)); ++j) {
    a[j] = 0.999f + *sink;
    b[j] = 1e-3f + *sink;
    for (int i = 0; i < CHAINS; ++i) acc[i][j] = (float)(i + j) + *sink;
  }
  for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) acc[i] = acc[i] * a + b;
  }
  float total = 0.0f;
  for (int i = 0; i < CHAINS; ++i)
    for (int j = 0; j < (int)(WIDTH / sizeof(float)); ++j) total += acc[i][j];
  *sink = total;
  return 2.0 * CHAINS * (WIDTH / sizeof(float)) * (double)rounds;
}
