/* The order of summation of AMX tiles, which is that of oneDNN's products there: 32 columns at a time, from left to right, a fresh
   sum every `block` columns; the sums of blocks are added in order. 0 is one block for all.

   Rows and columns of the matrix are multiples of 32, and so is a block. A row of x has the same sums however many others are
   multiplied with it. */

#pragma once

#include "inputs.h"
#include "../strips.h"

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed));

struct amx {
    struct tile_config before; /* each thread gets its own back: oneDNN keeps one */
    int64_t width;             /* rows of x that the tiles are configured for; 0 at first */
};

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#define HAS_AMX

/* Tiles are named by literals: the intrinsics paste them into register names. Sums of rows 0-15 and 16-31 of the strip, each
   with two groups of rows of x. */
#define SUM_0 0
#define SUM_1 1
#define SUM_2 2
#define SUM_3 3
#define W_0 4
#define W_1 5
#define X_0 6
#define X_1 7
enum { TILE_ROWS = 16, TILE_COLUMNS = 32, TILES = 8 };

/* Linux lets a process use AMX only when it asks. */
int expertier_has_amx(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* TILEDATA */) == 0; }

static void begin_amx(struct amx *amx) {
    _tile_storeconfig(&amx->before);
    amx->width = 0;
}

static void end_amx(const struct amx *amx) {
    if (amx->before.palette)
        _tile_loadconfig(&amx->before);
    else
        _tile_release();
}

/* The intrinsics do not tell the compiler what they read: it may leave out what is written before. */
static inline void load_config(const struct tile_config *config) {
    __asm__ volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
}

static inline void configure(struct amx *amx, int64_t width) {
    if (amx->width == width) return;
    struct tile_config config = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        config.rows[tile] = TILE_ROWS;
        config.row_bytes[tile] = tile == W_0 || tile == W_1 ? 2 * TILE_COLUMNS : (uint16_t)(width * (int64_t)sizeof(float));
    }
    load_config(&config);
    amx->width = width;
}

static inline void zero_sums(int is_pair) {
    _tile_zero(SUM_0);
    _tile_zero(SUM_1);
    if (is_pair) {
        _tile_zero(SUM_2);
        _tile_zero(SUM_3);
    }
}

/* One tile of columns: `w` has 32 rows, `x` one group of rows, or two that are `next` apart. */
static inline void add_tile(const uint16_t *w, int64_t stride, const uint32_t *x, int64_t width, int64_t next, int is_pair) {
    _tile_loadd(X_0, x, width * sizeof(float));
    _tile_loadd(W_0, w, 2 * stride);
    _tile_dpbf16ps(SUM_0, W_0, X_0);
    _tile_loadd(W_1, w + TILE_ROWS * stride, 2 * stride);
    _tile_dpbf16ps(SUM_1, W_1, X_0);
    if (is_pair) {
        _tile_loadd(X_1, x + next, width * sizeof(float));
        _tile_dpbf16ps(SUM_2, W_0, X_1);
        _tile_dpbf16ps(SUM_3, W_1, X_1);
    }
}

/* The same of one group in two parts, between which there is other work. */
static inline void load_tile(const uint16_t *w, int64_t stride, const uint32_t *x, int64_t width) {
    _tile_loadd(X_0, x, width * sizeof(float));
    _tile_loadd(W_0, w, 2 * stride);
    _tile_loadd(W_1, w + TILE_ROWS * stride, 2 * stride);
}

static inline void multiply_tile(void) {
    _tile_dpbf16ps(SUM_0, W_0, X_0);
    _tile_dpbf16ps(SUM_1, W_1, X_0);
}

/* Sums of a strip with one group of rows of x, or two: [group][row of the strip][row of x]. */
struct tile_sums {
    float of[2][STRIP_ROWS * X_ROWS] __attribute__((aligned(64)));
};

static inline void store_tiles(struct tile_sums *sums, int64_t width, int is_pair) {
    int64_t bytes = width * (int64_t)sizeof(float);
    _tile_stored(SUM_0, sums->of[0], bytes);
    _tile_stored(SUM_1, sums->of[0] + TILE_ROWS * width, bytes);
    if (!is_pair) return;
    _tile_stored(SUM_2, sums->of[1], bytes);
    _tile_stored(SUM_3, sums->of[1] + TILE_ROWS * width, bytes);
}

/* Move the finished sums of a block to the totals, which `is_first` begins. */
static void end_tile_block(struct tile_sums *totals, int64_t width, int is_pair, int is_first) {
    if (is_first) {
        store_tiles(totals, width, is_pair);
    } else {
        struct tile_sums sums;
        store_tiles(&sums, width, is_pair);
        for (int group = 0; group <= is_pair; group++)
            for (int64_t i = 0; i < STRIP_ROWS * width; i++) totals->of[group][i] += sums.of[group][i];
    }
    zero_sums(is_pair);
}

/* Sums of 16 rows of a strip with 16 rows of x, turned: those of one row of x lie side by side, STRIP_ROWS from the next one's. */
static void turn_sums(const float *sums, float *out) {
    __m512 a[X_ROWS], b[X_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < X_ROWS; i++) a[i] = _mm512_loadu_ps(sums + i * X_ROWS);
#pragma GCC unroll 8
    for (int i = 0; i < X_ROWS; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < X_ROWS; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            __m512d low = (__m512d)b[i + j], high = (__m512d)b[i + j + 2];
            a[i + 2 * j] = (__m512)_mm512_unpacklo_pd(low, high);
            a[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(low, high);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 even = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        __m512 even_below = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88), odd_below = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        _mm512_storeu_ps(out + j * STRIP_ROWS, _mm512_shuffle_f32x4(even, even_below, 0x88));
        _mm512_storeu_ps(out + (4 + j) * STRIP_ROWS, _mm512_shuffle_f32x4(odd, odd_below, 0x88));
        _mm512_storeu_ps(out + (8 + j) * STRIP_ROWS, _mm512_shuffle_f32x4(even, even_below, 0xdd));
        _mm512_storeu_ps(out + (12 + j) * STRIP_ROWS, _mm512_shuffle_f32x4(odd, odd_below, 0xdd));
    }
}

static void store_group(const struct strip *s, const float *sums, const struct inputs *x, int64_t group, uint16_t *y, int64_t y_stride) {
    int64_t width = group_width(x);
    float turned[X_ROWS * STRIP_ROWS];
    if (width == X_ROWS) {
        turn_sums(sums, turned);
        turn_sums(sums + TILE_ROWS * X_ROWS, turned + TILE_ROWS);
    } else {
        for (int64_t i = 0; i < width; i++)
            for (int64_t row = 0; row < STRIP_ROWS; row++) turned[i * STRIP_ROWS + row] = sums[row * width + i];
    }
    for (int64_t i = 0; i < width && group * X_ROWS + i < x->rows; i++) {
        float *sum = turned + i * STRIP_ROWS;
        uint16_t *out = y + (group * X_ROWS + i) * y_stride;
        if (s->bias)
            for (int64_t row = 0; row < STRIP_ROWS; row++) sum[row] += load_bf16(s->bias[row]);
        for (int64_t row = 0; row < STRIP_ROWS; row++) out[row] = round_bf16(sum[row]);
    }
}

static inline void store_totals(const struct strip *s, const struct tile_sums *totals, const struct inputs *x, int64_t group, int is_pair,
                                uint16_t *y, int64_t y_stride) {
    for (int n = 0; n <= is_pair; n++) store_group(s, totals->of[n], x, group + n, y, y_stride);
}

/* Rows of the strip that comes next, some for each group of x, which are asked for while this one is multiplied. */
struct next_rows {
    const uint16_t *w;
    int64_t begin, end;
};

static inline struct next_rows next_rows(const struct strip *s, int64_t group, int64_t groups) {
    int is_plain = s->m->form == PLAIN && groups > 2 && s->row + 2 * STRIP_ROWS <= s->m->rows;
    int64_t begin = STRIP_ROWS * group / groups, end = STRIP_ROWS * (group + 2) / groups;
    return (struct next_rows){plain_row(s, STRIP_ROWS), begin, !is_plain ? begin : end < STRIP_ROWS ? end : STRIP_ROWS};
}

static inline void ask_for(const struct next_rows *next, int64_t stride, int64_t column) {
    for (int64_t row = next->begin; row < next->end; row++) _mm_prefetch((const char *)(next->w + row * stride + column), _MM_HINT_T1);
}

/* A strip whose rows lie `stride` apart, times groups of x from `group` on, one or two. */
static inline void multiply_tiles(int64_t block, const struct strip *s, const uint16_t *w, int64_t stride, const struct inputs *x,
                                  int64_t group, int is_pair, uint16_t *y, int64_t y_stride) {
    int64_t width = group_width(x), next = width * padded(x->columns) / 2, columns = x->columns;
    const uint32_t *pairs = pairs_of(x, group);
    const struct next_rows ahead = next_rows(s, group, num_groups(x));
    struct tile_sums totals;
    zero_sums(is_pair);
    for (int64_t begin = 0, end; begin < columns; begin = end) {
        end = begin + block < columns ? begin + block : columns;
        for (int64_t c = begin; c < end; c += TILE_COLUMNS) {
            ask_for(&ahead, stride, c);
            add_tile(w + c, stride, pairs + c / 2 * width, width, next, is_pair);
        }
        end_tile_block(&totals, width, is_pair, begin == 0);
    }
    store_totals(s, &totals, x, group, is_pair, y, y_stride);
}

/* A strip that is expanded while it is multiplied with one group: between loading a tile and multiplying it, some rows of the next span
   are expanded, so that both units of the processor are busy. Those of few bits are so quick that more are expanded with each call. */
static inline __attribute__((always_inline)) void multiply_while_expanding(int64_t block, struct strip *s, const int kind,
                                                                           const struct inputs *x, struct room *room, uint16_t *y,
                                                                           int64_t y_stride) {
    const int span = (int)span_of(kind), steps = span / TILE_COLUMNS, every = is_few(kind) ? 2 : 1, rows = STRIP_ROWS / steps * every;
    int64_t width = group_width(x), columns = x->columns, stop = block;
    const uint32_t *pairs = pairs_of(x, 0);
    uint16_t *now = room->span[0], *next = room->span[1];
    struct tile_sums totals;
    expand_span(s, 0, now, span);
    zero_sums(0);
    load_tile(now, span, pairs, width);
    for (int64_t c = 0; c < columns; c += span) {
        for (int step = 0; step < steps; step++) {
            int64_t at = c + step * TILE_COLUMNS, after = at + TILE_COLUMNS;
            const int is_last = step == steps - 1;
            if (at < columns) {
                multiply_tile();
                if (after == stop || after == columns) {
                    end_tile_block(&totals, width, 0, stop == block);
                    stop += block;
                }
            }
            if (!is_last && after < columns) load_tile(now + (after - c), span, pairs + after / 2 * width, width);
            if (c + span < columns && step % every == 0)
                expand_span_of(s, kind, c + span, step * rows / every, step * rows / every + rows, next, span);
            if (is_last && after < columns) load_tile(next, span, pairs + after / 2 * width, width);
        }
        uint16_t *done = now;
        now = next;
        next = done;
    }
    store_totals(s, &totals, x, 0, 0, y, y_stride);
}

/* y[i][row] for all rows i of x and the rows of one strip. */
static void amx_strip(struct amx *amx, int64_t block, struct strip *s, const struct inputs *x, struct room *room, uint16_t *y, int64_t y_stride) {
    configure(amx, group_width(x));
    if (!block) block = x->columns;
    if (s->kind != PLAIN && s->kind != TERNARY && num_groups(x) == 1) {
        WITH_KIND_OF(s->kind, multiply_while_expanding(block, s, KIND, x, room, y, y_stride));
        return;
    }
    const uint16_t *w = plain_row(s, 0);
    if (s->m->form != PLAIN) {
        expand_strip(s, room->strip, padded(x->columns));
        w = room->strip;
    }
    int64_t stride = s->m->form == PLAIN ? x->columns : padded(x->columns), group = 0;
    for (; group + 2 <= num_groups(x); group += 2) multiply_tiles(block, s, w, stride, x, group, 1, y, y_stride);
    if (group < num_groups(x)) multiply_tiles(block, s, w, stride, x, group, 0, y, y_stride);
}
#else
int expertier_has_amx(void) { return 0; }
static void begin_amx(struct amx *amx) {}
static void end_amx(const struct amx *amx) {}
static inline void configure(struct amx *amx, int64_t width) {}
static void amx_strip(struct amx *amx, int64_t block, struct strip *s, const struct inputs *x, struct room *room, uint16_t *y, int64_t y_stride) {}
#endif
