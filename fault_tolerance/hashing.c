/* XXH3 (64 bits, no seed) of many ranges of memory that follow each other. What it must compute is said by the library `xxhash`,
 * against which `hashing.py` proves it; this file is for doing thousands of them in one call, which holds no lock of Python's.
 *
 *     ranges of more than 240 bytes    here: eight sums over stripes of 64 bytes, stirred after every 1024
 *     shorter ones                     left to the caller
 *
 * Source: the specification of XXH3 (Yann Collet, xxHash 0.8).
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(PLAIN)
#include <immintrin.h>
#define WIDE
#endif

#define LANES 8
#define STRIPE 64
#define STRIPES 16 /* in a block */
#define SHORT 240

static const uint64_t P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
static const uint64_t P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu, P64_3 = 0x165667B19E3779F9u;
static const uint64_t P64_4 = 0x85EBCA77C2B2AE63u, P64_5 = 0x27D4EB2F165667C5u;
static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static inline uint64_t word(const uint8_t *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    x = __builtin_bswap64(x);
#endif
    return x;
}

static void stripes_plain(uint64_t *sums, const uint8_t *x, const uint8_t *secret, ptrdiff_t n)
{
    for (; n > 0; n--, x += STRIPE, secret += 8)
        for (int lane = 0; lane < LANES; lane++) {
            uint64_t value = word(x + 8 * lane), keyed = value ^ word(secret + 8 * lane);
            sums[lane ^ 1] += value;
            sums[lane] += (uint32_t)keyed * (keyed >> 32);
        }
}

static void stir_plain(uint64_t *sums)
{
    for (int lane = 0; lane < LANES; lane++)
        sums[lane] = (sums[lane] ^ sums[lane] >> 47 ^ word(SECRET + 128 + 8 * lane)) * P32_1;
}

static void sum_plain(uint64_t *sums, const uint8_t *x, size_t size)
{
    size_t blocks = (size - 1) / (STRIPE * STRIPES);
    for (size_t block = 0; block < blocks; block++, x += STRIPE * STRIPES) {
        stripes_plain(sums, x, SECRET, STRIPES);
        stir_plain(sums);
    }
    size_t left = size - blocks * STRIPE * STRIPES;
    stripes_plain(sums, x, SECRET, (left - 1) / STRIPE);
    stripes_plain(sums, x + left - STRIPE, SECRET + 121, 1);
}

#ifdef WIDE
#define AVX2 __attribute__((target("avx2")))

AVX2 static inline void stripes_wide(__m256i *sums, const uint8_t *x, const uint8_t *secret, ptrdiff_t n)
{
    for (; n > 0; n--, x += STRIPE, secret += 8) {
        _mm_prefetch((const char *)x + 512, _MM_HINT_T0);
        for (int half = 0; half < 2; half++) {
            __m256i value = _mm256_loadu_si256((const __m256i *)(x + 32 * half));
            __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)(secret + 32 * half)));
            __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
            __m256i swapped = _mm256_shuffle_epi32(value, _MM_SHUFFLE(1, 0, 3, 2));
            sums[half] = _mm256_add_epi64(sums[half], _mm256_add_epi64(product, swapped));
        }
    }
}

AVX2 static inline void stir_wide(__m256i *sums)
{
    const __m256i prime = _mm256_set1_epi32((int)P32_1);
    for (int half = 0; half < 2; half++) {
        __m256i key = _mm256_loadu_si256((const __m256i *)(SECRET + 128 + 32 * half));
        __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(sums[half], _mm256_srli_epi64(sums[half], 47)), key);
        __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
        sums[half] = _mm256_add_epi64(_mm256_mul_epu32(mixed, prime), _mm256_slli_epi64(high, 32));
    }
}

AVX2 static void sum_wide(uint64_t *out, const uint8_t *x, size_t size)
{
    __m256i sums[2] = {_mm256_loadu_si256((__m256i *)out), _mm256_loadu_si256((__m256i *)(out + 4))};
    size_t blocks = (size - 1) / (STRIPE * STRIPES);
    for (size_t block = 0; block < blocks; block++, x += STRIPE * STRIPES) {
        stripes_wide(sums, x, SECRET, STRIPES);
        stir_wide(sums);
    }
    size_t left = size - blocks * STRIPE * STRIPES;
    stripes_wide(sums, x, SECRET, (left - 1) / STRIPE);
    stripes_wide(sums, x + left - STRIPE, SECRET + 121, 1);
    _mm256_storeu_si256((__m256i *)out, sums[0]);
    _mm256_storeu_si256((__m256i *)(out + 4), sums[1]);
}
#endif

static inline uint64_t folded(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t hash(const uint8_t *x, size_t size)
{
    uint64_t sums[LANES] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1}, h = size * P64_1;
#ifdef WIDE
    if (__builtin_cpu_supports("avx2"))
        sum_wide(sums, x, size);
    else
#endif
        sum_plain(sums, x, size);
    for (int pair = 0; pair < LANES / 2; pair++)
        h += folded(sums[2 * pair] ^ word(SECRET + 11 + 16 * pair), sums[2 * pair + 1] ^ word(SECRET + 19 + 16 * pair));
    h = (h ^ h >> 37) * 0x165667919E3779F9u;
    return h ^ h >> 32;
}

/* out[i] = the hash of the bytes between edges i and i + 1; the first edge is at x. Returns how many were too short. */
int64_t holdfast_hashes(const uint8_t *x, const int64_t *edges, int64_t n, uint64_t *out)
{
    int64_t skipped = 0;
    for (int64_t i = 0; i < n; i++) {
        size_t size = (size_t)(edges[i + 1] - edges[i]);
        if (size > SHORT)
            out[i] = hash(x + (edges[i] - edges[0]), size);
        else
            skipped++;
    }
    return skipped;
}
