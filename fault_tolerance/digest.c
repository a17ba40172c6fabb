/* The digest of `digest.py` over one box in memory, in one pass. Its definition, and the proof that this file keeps it,
 * are there; this is only the fast way to the same number.
 *
 *     D = sum over elements of  (f(bits) + MISSING) * w_0(i_0) * w_1(i_1) * ...   mod 2^64
 *
 * Weights of the last dimension are made for BLOCK coordinates at a time and used by all rows; those of the others are
 * made as the walk comes to them. So nothing is allocated, and the scratch stays in the first-level cache.
 *
 * Rule of this file: it trusts its caller. Elements must be aligned to their width, and ndim >= 1.
 */
#include <stddef.h>
#include <stdint.h>

#define SPREAD 0x9E3779B97F4A7C15u
#define MISSING 0xD1B54A32D192ED03u
#define BLOCK 1024

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(PLAIN)
#include <immintrin.h>
#define WIDE
#define CLONES __attribute__((target_clones("avx2", "default"))) /* chosen when it is loaded: the file may be shared by machines */
#else
#define CLONES
#endif

static inline uint64_t weight(uint64_t seed, uint64_t i)
{
    uint64_t x = seed + i * SPREAD;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return (x ^ x >> 31) | 1;
}

/* The weights of n coordinates from `first` on. Returns their sum. */
CLONES static uint64_t weights(uint64_t *w, uint64_t seed, uint64_t first, ptrdiff_t n)
{
    uint64_t sum = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        sum += w[i] = weight(seed, first + i);
    return sum;
}

static inline uint64_t spread(uint64_t bits)
{
    uint64_t x = bits * SPREAD;
    return x ^ x >> 32;
}

#define DOT(bits) \
    CLONES static uint64_t dot##bits(const uint##bits##_t *x, const uint64_t *w, ptrdiff_t n) \
    { \
        uint64_t total = 0; \
        for (ptrdiff_t i = 0; i < n; i++) \
            total += spread(x[i]) * w[i]; \
        return total; \
    } \
    static uint64_t dot##bits##_strided(const char *x, ptrdiff_t stride, const uint64_t *w, ptrdiff_t n) \
    { \
        uint64_t total = 0; \
        for (ptrdiff_t i = 0; i < n; i++) \
            total += spread(*(const uint##bits##_t *)(x + i * stride)) * w[i]; \
        return total; \
    }
DOT(8)
DOT(16)
DOT(32)
DOT(64)

#ifdef WIDE
/* float32 is nearly all of a state. Its bits have 32 zeros above them and the multiplier has 32 by 32 bits, so five products
 * do for an element, where the compiler takes six; those that count only above bit 32 are summed on their own. */
__attribute__((target("avx2"))) static uint64_t dot32_wide(const uint32_t *x, const uint64_t *w, ptrdiff_t n)
{
    const __m256i low = _mm256_set1_epi64x((uint32_t)SPREAD), high = _mm256_set1_epi64x(SPREAD >> 32);
    __m256i sum = _mm256_setzero_si256(), above = sum;
    uint64_t a[4], b[4];
    ptrdiff_t i = 0;
    for (; i + 4 <= n; i += 4) {
        __m256i bits = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i *)(x + i)));
        __m256i f = _mm256_add_epi64(_mm256_mul_epu32(bits, low), _mm256_slli_epi64(_mm256_mul_epu32(bits, high), 32));
        __m256i f_high = _mm256_srli_epi64(f, 32), weight = _mm256_loadu_si256((const __m256i *)(w + i));
        f = _mm256_xor_si256(f, f_high);
        sum = _mm256_add_epi64(sum, _mm256_mul_epu32(f, weight));
        above = _mm256_add_epi64(above, _mm256_mul_epu32(f, _mm256_srli_epi64(weight, 32)));
        above = _mm256_add_epi64(above, _mm256_mul_epu32(f_high, weight));
    }
    _mm256_storeu_si256((__m256i *)a, sum);
    _mm256_storeu_si256((__m256i *)b, above);
    return a[0] + a[1] + a[2] + a[3] + ((b[0] + b[1] + b[2] + b[3]) << 32) + dot32(x + i, w + i, n - i);
}
#endif

struct box {
    int width, ndim;
    const int64_t *shape, *strides, *start;
    const uint64_t *seeds;
};

static uint64_t dot(const char *x, ptrdiff_t stride, const uint64_t *w, ptrdiff_t n, int width)
{
    int dense = stride == width;
#ifdef WIDE
    if (dense && width == 4 && __builtin_cpu_supports("avx2"))
        return dot32_wide((const uint32_t *)x, w, n);
#endif
    switch (width) {
    case 1: return dense ? dot8((const uint8_t *)x, w, n) : dot8_strided(x, stride, w, n);
    case 2: return dense ? dot16((const uint16_t *)x, w, n) : dot16_strided(x, stride, w, n);
    case 4: return dense ? dot32((const uint32_t *)x, w, n) : dot32_strided(x, stride, w, n);
    default: return dense ? dot64((const uint64_t *)x, w, n) : dot64_strided(x, stride, w, n);
    }
}

/* The sum over dimensions dim .. ndim-1, of which the last is cut to n coordinates whose weights are w. */
static uint64_t walk(const struct box *b, int dim, const char *x, const uint64_t *w, ptrdiff_t n)
{
    if (dim == b->ndim - 1)
        return dot(x, b->strides[dim], w, n, b->width);
    uint64_t total = 0;
    for (int64_t i = 0; i < b->shape[dim]; i++)
        total += weight(b->seeds[dim], b->start[dim] + i) * walk(b, dim + 1, x + i * b->strides[dim], w, n);
    return total;
}

uint64_t holdfast_digest(const char *x, int width, int ndim, const int64_t *shape, const int64_t *strides, const int64_t *start, const uint64_t *seeds)
{
    struct box b = {width, ndim, shape, strides, start, seeds};
    uint64_t total = 0, covered = MISSING, w[BLOCK];
    for (int dim = 0; dim < ndim; dim++) {
        uint64_t sum = 0;
        for (int64_t first = 0; first < shape[dim]; first += BLOCK) {
            int64_t n = shape[dim] - first < BLOCK ? shape[dim] - first : BLOCK;
            sum += weights(w, seeds[dim], start[dim] + first, n);
            if (dim == ndim - 1)
                total += walk(&b, 0, x + first * strides[dim], w, n);
        }
        covered *= sum;
    }
    return total + covered;
}
