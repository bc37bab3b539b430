/* Matrix-vector products and whole experts for single tokens in bfloat16, at the speed of memory.

   y[r] = sum_c w[r][c] * x[c] with w row-major [rows, columns], accumulated in float32, rounded to bfloat16 once.
   The order of a sum depends on `columns` alone, so results do not depend on threads, on what else is computed, or on
   whether the weights are compressed. */

#include "bfloat16.h"
#include "compressed.h"

#include <stdlib.h>

enum { CHUNK = 4 };

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

/* The columns of a dot product are added in runs of 128, so whole rows are needed. */
static void dot_compressed_block(const struct compressed_block *w, const uint16_t *x, uint16_t *y, int64_t columns) {
    uint16_t *rows = aligned_alloc(64, BLOCK_ROWS * columns * sizeof(uint16_t));
    expand_block(w, rows, columns);
    dot_block(rows, x, y, BLOCK_ROWS, columns);
    free(rows);
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

static inline void add_columns(const uint16_t *w, int64_t stride, const uint16_t *x) {
    _tile_loadd(X, x, sizeof(float));
    _tile_loadd(W_LOW, w, 2 * stride);
    _tile_loadd(W_HIGH, w + ROWS * stride, 2 * stride);
    _tile_dpbf16ps(SUM_LOW, W_LOW, X);
    _tile_dpbf16ps(SUM_HIGH, W_HIGH, X);
}

static inline void store_sums(uint16_t *y, int64_t rows) {
    float sums[BLOCK_ROWS];
    _tile_stored(SUM_LOW, sums, sizeof(float));
    _tile_stored(SUM_HIGH, sums + ROWS, sizeof(float));
    for (int64_t row = 0; row < rows; row++) y[row] = round_bf16(sums[row]);
}

/* `rows` is BLOCK_ROWS, `columns` a multiple of COLUMNS. */
static void amx_block(const uint16_t *w, const uint16_t *x, uint16_t *y, int64_t rows, int64_t columns) {
    _tile_zero(SUM_LOW);
    _tile_zero(SUM_HIGH);
    for (int64_t c = 0; c < columns; c += COLUMNS) add_columns(w + c, columns, x + c);
    store_sums(y, rows);
}

/* Between the four tile products of a segment, the next segment is expanded, a quarter each time. */
static void amx_compressed_block(const struct compressed_block *w, const uint16_t *x, uint16_t *y, int64_t columns) {
    enum { QUARTER = BLOCK_ROWS / 4, STRIDE = SEGMENT_COLUMNS };
    uint16_t room[2][SEGMENT_CODES] __attribute__((aligned(64)));
    int64_t segments = columns / SEGMENT_COLUMNS;
    const uint8_t *others = expand_rows(w->segments, w->head, w->others, 0, BLOCK_ROWS, room[0], STRIDE);
    _tile_zero(SUM_LOW);
    _tile_zero(SUM_HIGH);
    for (int64_t s = 0; s < segments; s++) {
        const uint8_t *next = w->segments + (s + 1) * SEGMENT_BYTES;
        for (int quarter = 0; quarter < 4; quarter++) {
            const uint16_t *columns_32 = room[s % 2] + quarter / 2 * COLUMNS;
            if (quarter % 2 == 0) {
                _tile_loadd(X, x + s * SEGMENT_COLUMNS + quarter / 2 * COLUMNS, sizeof(float));
                _tile_loadd(W_LOW, columns_32, 2 * STRIDE);
                _tile_dpbf16ps(SUM_LOW, W_LOW, X);
            } else {
                _tile_loadd(W_HIGH, columns_32 + ROWS * STRIDE, 2 * STRIDE);
                _tile_dpbf16ps(SUM_HIGH, W_HIGH, X);
            }
            if (s + 1 < segments)
                others = expand_rows(next, w->head, others, quarter * QUARTER, (quarter + 1) * QUARTER, room[(s + 1) % 2], STRIDE);
        }
    }
    store_sums(y, BLOCK_ROWS);
}
#else
int expertier_has_amx(void) { return 0; }
static void begin_amx(struct tile_config *before) {}
static void end_amx(const struct tile_config *before) {}
#define amx_block dot_block
#define amx_compressed_block dot_compressed_block
#endif

/* --- what is called ---------------------------------------------------------------------------------------------- */

enum form { PLAIN, COMPRESSED };

struct matrix {
    enum form form;
    const void *w;
    int64_t rows, columns;
};

/* At most 32 rows from `row` on, at most `left`, times x. */
static inline void block(int amx, const struct matrix *m, int64_t row, int64_t left, const uint16_t *x, uint16_t *y) {
    if (m->form == PLAIN) {
        const uint16_t *w = (const uint16_t *)m->w + row * m->columns;
        (amx ? amx_block : dot_block)(w, x, y, left < BLOCK_ROWS ? left : BLOCK_ROWS, m->columns);
    } else {
        struct compressed_block w = compressed_block(m->w, m->rows, m->columns, row / BLOCK_ROWS);
        (amx ? amx_compressed_block : dot_compressed_block)(&w, x, y, m->columns);
    }
}

/* y[n] = w[n] (x + n * x_step) for n = 0 .. num - 1, each w[n] and y[n] in its own place, w[n] with rows[n] rows.
   For AMX, rows and columns are multiples of 32. */
void expertier_matvec(int amx, enum form form, int64_t num, const void *const *w, const uint16_t *x, int64_t x_step,
                      uint16_t *const *y, const int64_t *rows, int64_t columns) {
    int64_t blocks = 0;
    for (int64_t n = 0; n < num; n++) blocks += (rows[n] + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel
    {
        struct tile_config before;
        if (amx) begin_amx(&before);
#pragma omp for schedule(dynamic, CHUNK)
        for (int64_t i = 0; i < blocks; i++) {
            int64_t n = 0, row = i * BLOCK_ROWS;
            for (; row >= rows[n]; n++) row -= (rows[n] + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
            struct matrix matrix = {form, w[n], rows[n], columns};
            block(amx, &matrix, row, rows[n] - row, x + n * x_step, y[n] + row);
        }
        if (amx) end_amx(&before);
    }
}

/* y[n] = down[n] (act(up[n][:width] x) * (up[n][width:] x)), without the second factor if `gated` is 0.
   `act` has the activation of each of the 65536 bfloat16 numbers; `hidden` is room for [num, width]. */
void expertier_experts(int amx, enum form form, int64_t num, const void *const *up, const void *const *down,
                       const uint16_t *x, const uint16_t *act, int gated, uint16_t *hidden, uint16_t *const *y,
                       int64_t width, int64_t model_width) {
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
            struct matrix matrix = {form, up[n], gated ? 2 * width : width, model_width};
            block(amx, &matrix, row, width - row, x, gate);
            if (gated) block(amx, &matrix, width + row, width - row, x, linear);
            for (int64_t j = 0; j < BLOCK_ROWS && row + j < width; j++) {
                uint16_t value = act[gate[j]];
                hidden[n * width + row + j] = gated ? round_bf16(load_bf16(value) * load_bf16(linear[j])) : value;
            }
        }
#pragma omp for schedule(dynamic, CHUNK)
        for (int64_t i = 0; i < num * down_blocks; i++) {
            int64_t n = i / down_blocks, row = i % down_blocks * BLOCK_ROWS;
            struct matrix matrix = {form, down[n], model_width, width};
            block(amx, &matrix, row, model_width - row, hidden + n * width, y[n] + row);
        }
        if (amx) end_amx(&before);
    }
}

/* All of a compressed matrix, row-major. */
void expertier_expand(const void *w, int64_t rows, int64_t columns, uint16_t *out) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows / BLOCK_ROWS; i++) {
        struct compressed_block at = compressed_block(w, rows, columns, i);
        expand_block(&at, out + i * BLOCK_ROWS * columns, columns);
    }
}
