/* Matrix-vector products and whole experts for single tokens in bfloat16, at the speed of memory.

   y[r] = sum_c w[r][c] * x[c] with w row-major [rows, columns], accumulated in float32, rounded to bfloat16 once.
   The order of a sum depends on `columns` alone, so results do not depend on threads or on what else is computed. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK_ROWS = 32, CHUNK = 4 };

static inline float load_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t round_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* --- dot products: every processor, quickest with avx512_bf16 -------------------------------------------------- */

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
static float dot(const uint16_t *w, const uint16_t *x, int64_t columns) {
    __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 128 <= columns; i += 128) {
        _mm_prefetch((const char *)(w + i) + 2048, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + i) + 2112, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + i) + 2176, _MM_HINT_T0);
        _mm_prefetch((const char *)(w + i) + 2240, _MM_HINT_T0);
        a = _mm512_dpbf16_ps(a, (__m512bh)_mm512_loadu_si512(w + i), (__m512bh)_mm512_loadu_si512(x + i));
        b = _mm512_dpbf16_ps(b, (__m512bh)_mm512_loadu_si512(w + i + 32), (__m512bh)_mm512_loadu_si512(x + i + 32));
        c = _mm512_dpbf16_ps(c, (__m512bh)_mm512_loadu_si512(w + i + 64), (__m512bh)_mm512_loadu_si512(x + i + 64));
        d = _mm512_dpbf16_ps(d, (__m512bh)_mm512_loadu_si512(w + i + 96), (__m512bh)_mm512_loadu_si512(x + i + 96));
    }
    for (; i < columns; i += 32) {
        __mmask32 mask = columns - i >= 32 ? 0xffffffffu : ((1u << (columns - i)) - 1);
        a = _mm512_dpbf16_ps(a, (__m512bh)_mm512_maskz_loadu_epi16(mask, w + i),
                             (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
}
#else
static float dot(const uint16_t *w, const uint16_t *x, int64_t columns) {
    float lanes[32] = {0};
    int64_t i = 0;
    for (; i + 32 <= columns; i += 32)
        for (int j = 0; j < 32; j++) lanes[j] += load_bf16(w[i + j]) * load_bf16(x[i + j]);
    for (int j = 0; i < columns; i++, j++) lanes[j] += load_bf16(w[i]) * load_bf16(x[i]);
    float total = 0;
    for (int j = 0; j < 32; j++) total += lanes[j];
    return total;
}
#endif

static void dot_block(const uint16_t *w, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; row++) y[row] = round_bf16(dot(w + row * columns, x, columns));
}

/* --- AMX tiles: the order of summation of oneDNN's AMX matrix products, 32 columns at a time ------------------- */

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed));

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* tiles are named by literals: the intrinsics paste them into register names */
#define SUM_LOW 0
#define SUM_HIGH 1
#define W_LOW 2
#define W_HIGH 3
#define X 4
#define TILES 5
enum { ROWS = BLOCK_ROWS / 2, COLUMNS = 32 };

/* Linux lets a process use AMX only when it asks. */
int expertier_has_amx(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* TILEDATA */) == 0; }

static void begin_amx(struct tile_config *before) {
    struct tile_config config = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        config.rows[tile] = ROWS;
        config.row_bytes[tile] = tile == W_LOW || tile == W_HIGH ? 2 * COLUMNS : sizeof(float);
    }
    _tile_storeconfig(before);
    _tile_loadconfig(&config);
}

/* Each thread gets its earlier tile configuration back: oneDNN keeps one. */
static void end_amx(const struct tile_config *before) {
    if (before->palette)
        _tile_loadconfig(before);
    else
        _tile_release();
}

/* `rows` is BLOCK_ROWS, `columns` a multiple of COLUMNS. */
static void amx_block(const uint16_t *w, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns) {
    float sums[BLOCK_ROWS];
    _tile_zero(SUM_LOW);
    _tile_zero(SUM_HIGH);
    for (int64_t c = 0; c < columns; c += COLUMNS) {
        _tile_loadd(X, x + c, sizeof(float));
        _tile_loadd(W_LOW, w + c, 2 * columns);
        _tile_loadd(W_HIGH, w + ROWS * columns + c, 2 * columns);
        _tile_dpbf16ps(SUM_LOW, W_LOW, X);
        _tile_dpbf16ps(SUM_HIGH, W_HIGH, X);
    }
    _tile_stored(SUM_LOW, sums, sizeof(float));
    _tile_stored(SUM_HIGH, sums + ROWS, sizeof(float));
    for (int64_t row = 0; row < rows; row++) y[row] = round_bf16(sums[row]);
}
#else
int expertier_has_amx(void) { return 0; }
static void begin_amx(struct tile_config *before) {}
static void end_amx(const struct tile_config *before) {}
#define amx_block dot_block
#endif

/* --- what is called ---------------------------------------------------------------------------------------------- */

static inline void block(int amx, const uint16_t *w, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns) {
    (amx ? amx_block : dot_block)(w, x, y, rows < BLOCK_ROWS ? rows : BLOCK_ROWS, columns);
}

/* y[n] = w[n] x[n] for n = 0 .. num - 1, each w[n] in its own place, x and y one behind the other. For AMX, rows and
   columns are multiples of 32. */
void expertier_matvec(int amx, int64_t num, const uint16_t *const *w, const uint16_t *x, uint16_t *y, int64_t rows,
                      int64_t columns) {
    int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel
    {
        struct tile_config before;
        if (amx) begin_amx(&before);
#pragma omp for schedule(dynamic, CHUNK)
        for (int64_t i = 0; i < num * blocks; i++) {
            int64_t n = i / blocks, row = i % blocks * BLOCK_ROWS;
            block(amx, w[n] + row * columns, x + n * columns, y + n * rows + row, rows - row, columns);
        }
        if (amx) end_amx(&before);
    }
}

/* y[n] = down[n] (act(up[n][:width] x) * (up[n][width:] x)), without the second factor if `gated` is 0.
   `act` has the activation of each of the 65536 bfloat16 numbers; `hidden` is room for [num, width]. */
void expertier_experts(int amx, int64_t num, const uint16_t *const *up, const uint16_t *const *down, const uint16_t *x,
                       const uint16_t *act, int gated, uint16_t *hidden, uint16_t *const *y, int64_t width,
                       int64_t model_width) {
    int64_t up_blocks = (width + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int64_t down_blocks = (model_width + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel
    {
        struct tile_config before;
        if (amx) begin_amx(&before);
#pragma omp for schedule(dynamic, CHUNK / 2)
        for (int64_t i = 0; i < num * up_blocks; i++) {
            int64_t n = i / up_blocks, row = i % up_blocks * BLOCK_ROWS;
            uint16_t gate[BLOCK_ROWS], linear[BLOCK_ROWS];
            block(amx, up[n] + row * model_width, x, gate, width - row, model_width);
            if (gated) block(amx, up[n] + (width + row) * model_width, x, linear, width - row, model_width);
            for (int64_t j = 0; j < BLOCK_ROWS && row + j < width; j++) {
                uint16_t value = act[gate[j]];
                hidden[n * width + row + j] = gated ? round_bf16(load_bf16(value) * load_bf16(linear[j])) : value;
            }
        }
#pragma omp for schedule(dynamic, CHUNK)
        for (int64_t i = 0; i < num * down_blocks; i++) {
            int64_t n = i / down_blocks, row = i % down_blocks * BLOCK_ROWS;
            block(amx, down[n] + row * width, hidden + n * width, y[n] + row, model_width - row, width);
        }
        if (amx) end_amx(&before);
    }
}

/* Reads memory, so that it is in the cache. */
void expertier_touch(const volatile char *start, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) (void)start[i];
}
