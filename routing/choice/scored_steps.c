/* A projection, a GRU cell and scores of its states for many tokens, BLOCK of them at a time: what lies between the
   products never leaves the cache.

   T tokens, D inputs, p state width, R scores. A left factor lies in chunks of DEPTH columns, [chunk][BLOCK][DEPTH]; a
   right factor in panels of PANEL outputs, [panel][inputs][PANEL], the last one filled up with zeros. The order of a sum
   depends on the widths alone, so the result of a token does not depend on the others. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 14 };
#elif defined(__AVX2__) || defined(__ARM_NEON)
enum { LANES = 8, ROWS = 6 };
#else
#error "no registers wide enough for tiles; torch's products are faster here"
#endif
enum { PANEL = 2 * LANES, DEPTH = 128, TILES = 4, BLOCK = ROWS * TILES };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static int64_t rounded_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- products ---------------------------------------------------------------------------------------------------- */

/* By all threads of a team, which go on without waiting for each other. */
static void pack(const float *weight, int64_t outputs, int64_t inputs, float *packed) {
#pragma omp for nowait
    for (int64_t j0 = 0; j0 < outputs; j0 += PANEL)
        for (int64_t j = 0; j < PANEL; j++)
            for (int64_t i = 0; i < inputs; i++)
                packed[j0 * inputs + i * PANEL + j] = j0 + j < outputs ? weight[(j0 + j) * inputs + i] : 0;
}

/* c [ROWS, PANEL] = a [ROWS, depth] b [depth, PANEL], or added to it; c stays in registers. */
static inline void tile(const float *a, const float *b, int64_t depth, float *c, int64_t stride, int adds) {
    lanes sum[ROWS][2];
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++)
        for (int half = 0; half < 2; half++)
            sum[row][half] = adds ? *(const lanes *)(c + row * stride + half * LANES) : (lanes){0};
    for (int64_t i = 0; i < depth; i++) {
        lanes left = *(const lanes *)(b + i * PANEL), right = *(const lanes *)(b + i * PANEL + LANES);
#pragma GCC unroll 14
        for (int row = 0; row < ROWS; row++) {
            float x = a[row * DEPTH + i];
            sum[row][0] += x * left;
            sum[row][1] += x * right;
        }
    }
#pragma GCC unroll 14
    for (int row = 0; row < ROWS; row++)
        for (int half = 0; half < 2; half++) *(lanes *)(c + row * stride + half * LANES) = sum[row][half];
}

/* c [BLOCK, wide] = a b, or added to it; wide is a multiple of PANEL. */
static void multiply(const float *a, const float *packed, int64_t inputs, int64_t wide, float *c, int adds) {
    for (int64_t i0 = 0; i0 < inputs; i0 += DEPTH)
        for (int64_t j0 = 0; j0 < wide; j0 += PANEL)
            for (int64_t row = 0; row < BLOCK; row += ROWS)
                tile(a + i0 * BLOCK + row * DEPTH, packed + j0 * inputs + i0 * PANEL, least(inputs - i0, DEPTH),
                     c + row * wide + j0, wide, adds || i0);
}

static void chunk(const float *x, int64_t rows, int64_t width, int64_t stride, float *chunks) {
    for (int64_t i0 = 0; i0 < width; i0 += DEPTH)
        for (int64_t row = 0; row < rows; row++)
            memcpy(chunks + i0 * BLOCK + row * DEPTH, x + row * stride + i0, least(width - i0, DEPTH) * sizeof(float));
}

static void unchunk(const float *chunks, int64_t rows, int64_t width, float *x) {
    for (int64_t i0 = 0; i0 < width; i0 += DEPTH)
        for (int64_t row = 0; row < rows; row++)
            memcpy(x + row * width + i0, chunks + i0 * BLOCK + row * DEPTH, least(width - i0, DEPTH) * sizeof(float));
}

/* --- the cell ---------------------------------------------------------------------------------------------------- */

static lanes choose(bits is, lanes a, lanes b) { return (lanes)(((bits)a & is) | ((bits)b & ~is)); }

/* exp(x) - 1 for |x| up to 80, beyond as at 80: 2^n e^r - 1 with |r| <= log(2) / 2 and a Taylor polynomial, without
   cancellation at 0. */
static inline lanes exp_minus_1(lanes x) {
    x = choose(x < -80.0f, (lanes){} - 80.0f, choose(x > 80.0f, (lanes){} + 80.0f, x));
    const float to_integer = 12582912.0f;
    lanes shifted = x * 1.44269504088896341f + to_integer, n = shifted - to_integer;
    lanes r = x - n * 0.693145751953125f - n * 1.428606765330187e-06f;
    lanes q = 1.0f / 5040 + r * (1.0f / 40320);
    q = 1.0f / 720 + r * q;
    q = 1.0f / 120 + r * q;
    q = 1.0f / 24 + r * q;
    q = 1.0f / 6 + r * q;
    q = 0.5f + r * q;
    lanes power = (lanes)(((bits)shifted << 23) + (127 << 23));
    return (power - 1.0f) + power * (r + r * r * q);
}

static inline lanes sigmoid(lanes x) { return 1.0f / (2.0f + exp_minus_1(-x)); }

static inline lanes hyperbolic_tangent(lanes x) {
    lanes e = exp_minus_1(2.0f * x);
    return e / (e + 2.0f);
}

/* One block's reset gate, update gate, new state and the former state's part of the latter, [BLOCK, wide] each. */
struct gates {
    float *reset, *update, *inner, *of_state;
};

/* Biases come as [3, wide]: of the reset gate, the update gate and the new state. The first three of `g` become gates. */
static void step(struct gates g, const float *state, const float *bias_x, const float *bias_h, int64_t wide, float *after) {
    for (int64_t row = 0; row < BLOCK; row++)
        for (int64_t j = 0; j < wide; j += LANES) {
            int64_t here = row * wide + j, there = j / DEPTH * BLOCK * DEPTH + row * DEPTH + j % DEPTH;
#define AT(numbers, place) (*(const lanes *)((numbers) + (place)))
            lanes reset = sigmoid(AT(g.reset, here) + AT(bias_x, j) + AT(bias_h, j));
            lanes update = sigmoid(AT(g.update, here) + AT(bias_x, wide + j) + AT(bias_h, wide + j));
            lanes of_state = AT(g.of_state, here) + AT(bias_h, 2 * wide + j);
            lanes inner = hyperbolic_tangent(AT(g.inner, here) + AT(bias_x, 2 * wide + j) + reset * of_state);
            *(lanes *)(after + there) = inner + update * (AT(state, there) - inner);
            *(lanes *)(g.reset + here) = reset, *(lanes *)(g.update + here) = update;
            *(lanes *)(g.inner + here) = inner;
#undef AT
        }
}

/* --- all of it --------------------------------------------------------------------------------------------------- */

struct weights {
    float *projection, *of_x[3], *of_state[3], *score, *bias_x, *bias_h;
};

/* Where each weight goes in one piece of memory; returns its size. */
static int64_t lay_out(struct weights *w, float *memory, int64_t D, int64_t p, int64_t wide, int64_t wide_score) {
    float *next = memory;
    w->projection = next, next += wide * D;
    for (int gate = 0; gate < 3; gate++) {
        w->of_x[gate] = next, next += wide * p;
        w->of_state[gate] = next, next += wide * p;
    }
    w->score = next, next += wide_score * p;
    w->bias_x = next, next += 3 * wide;
    w->bias_h = next, next += 3 * wide;
    return next - memory;
}

static float *zeros(int64_t count) {
    float *memory = aligned_alloc(64, rounded_up(count * sizeof(float), 64));
    return memory ? memset(memory, 0, count * sizeof(float)) : NULL;
}

/* What a backward pass needs of some rows, or NULL: the projected input and the old state's part of the candidate [T, p],
   and the gates side by side [T, 3 p]. */
struct kept {
    float *projected, *of_state, *gates;
};

static void keep(struct kept kept, const float *projected, struct gates g, const float *bias, int64_t t, int64_t rows,
                 int64_t p, int64_t wide) {
    const float *of_gate[3] = {g.reset, g.update, g.inner};
    for (int64_t row = 0; row < rows; row++) {
        memcpy(kept.projected + (t + row) * p, projected + row * wide, p * sizeof(float));
        for (int64_t j = 0; j < p; j++) kept.of_state[(t + row) * p + j] = g.of_state[row * wide + j] + bias[j];
        for (int gate = 0; gate < 3; gate++)
            memcpy(kept.gates + ((t + row) * 3 + gate) * p, of_gate[gate] + row * wide, p * sizeof(float));
    }
}

/* x [T, D] and state [T, p], or NULL for zeros, give the state `after` [T, p] and `score` [T, R], and what a backward pass
   needs unless `gates` is NULL. Weights are those of torch.nn.Linear and torch.nn.GRUCell. 0, or 1 without memory. */
int expertier_scored_steps(const float *x, const float *state, const float *projection, const float *weight_x,
                           const float *weight_h, const float *bias_x, const float *bias_h, const float *weight_score,
                           float *after, float *score, float *projected_kept, float *of_state_kept, float *gates_kept,
                           int64_t T, int64_t D, int64_t p, int64_t R) {
    struct kept kept = {projected_kept, of_state_kept, gates_kept};
    int64_t wide = rounded_up(p, PANEL), wide_score = rounded_up(R, PANEL), deep = rounded_up(wide, DEPTH);
    struct weights w;
    float *packed = zeros(lay_out(&w, NULL, D, p, wide, wide_score));
    if (!packed) return 1;
    lay_out(&w, packed, D, p, wide, wide_score);
    for (int gate = 0; gate < 3; gate++) {
        memcpy(w.bias_x + gate * wide, bias_x + gate * p, p * sizeof(float));
        memcpy(w.bias_h + gate * wide, bias_h + gate * p, p * sizeof(float));
    }
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        pack(projection, p, D, w.projection);
        for (int gate = 0; gate < 3; gate++) {
            pack(weight_x + gate * p * p, p, p, w.of_x[gate]);
            if (state) pack(weight_h + gate * p * p, p, p, w.of_state[gate]);
        }
        pack(weight_score, R, p, w.score);

        float *own = zeros(BLOCK * (rounded_up(D, DEPTH) + 3 * deep + 5 * wide + wide_score));
        float *given = own, *projected = given + BLOCK * rounded_up(D, DEPTH), *before = projected + BLOCK * deep;
        float *next = before + BLOCK * deep, *flat = next + BLOCK * deep, *scores = flat + BLOCK * wide;
        float *first_gate = scores + BLOCK * wide_score;
        struct gates g = {first_gate, first_gate + BLOCK * wide, first_gate + 2 * BLOCK * wide, first_gate + 3 * BLOCK * wide};
        float *of_x[3] = {g.reset, g.update, g.inner}, *of_state[3] = {g.reset, g.update, g.of_state};
        failed = !own;
#pragma omp barrier
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < T; t += BLOCK) {
            if (failed) continue;
            int64_t rows = least(T - t, BLOCK);
            chunk(x + t * D, rows, D, D, given);
            multiply(given, w.projection, D, wide, flat, 0);
            chunk(flat, rows, p, wide, projected);
            for (int gate = 0; gate < 3; gate++) multiply(projected, w.of_x[gate], p, wide, of_x[gate], 0);
            if (state) {
                chunk(state + t * p, rows, p, p, before);
                for (int gate = 0; gate < 3; gate++) multiply(before, w.of_state[gate], p, wide, of_state[gate], gate < 2);
            }
            step(g, before, w.bias_x, w.bias_h, wide, next);
            if (gates_kept) keep(kept, flat, g, w.bias_h + 2 * wide, t, rows, p, wide);
            multiply(next, w.score, p, wide_score, scores, 0);
            unchunk(next, rows, p, after + t * p);
            for (int64_t row = 0; row < rows; row++)
                memcpy(score + (t + row) * R, scores + row * wide_score, R * sizeof(float));
        }
        free(own);
    }
    free(packed);
    return failed;
}
