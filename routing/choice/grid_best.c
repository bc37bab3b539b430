/* The best places of a square grid: for each query the K best rows and the K best columns, then the K best of their
   pairs. Meanwhile its scores are in the cache, and their softmax is summed over the queries.

   n queries, r ranks, M rows and as many columns, P pairs of a ranked row and a ranked column: each of the best rows
   with some of the best columns. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct grid {
    int64_t n, r, M, K, P;
    const float *part;       /* [2][r][n][M], of rows and of columns */
    const float *proxy;      /* [2][r]: a score is the sum of its parts by these; 0: the only part is the score */
    const float *core;       /* [r][r]: a pair's score is bilinear in their parts; 0: it is the sum of their scores */
    const int64_t *columns;  /* [K]: with how many of the best columns a row is paired, the best row first; P in all */
    const uint8_t *is_valid; /* [n]; 0: all are */
    int64_t *row, *column;   /* [n][K], best first */
    float *score;            /* [n][K] */
    float *picked;           /* [2][r][n][K]: parts of the chosen rows and columns; 0: not wanted */
    float *total;            /* [blocks of n][2][M]: softmax of valid queries, summed */
    double *entropy;         /* [blocks of n] */
};

/* What one thread works with. */
struct room {
    float *projected, *share;    /* [M] */
    float *best[2], *parts[2];   /* [K], and [r][K] of the best rows or columns */
    float *pair, *pair_best;     /* [P], [K] */
    int64_t *place[2], *chosen;  /* [K] */
    int32_t *rank[2];            /* [P]: of a pair's row, and of its column */
};

/* Queries whose sums are added up before those of others: the sums are the same for any number of threads. */
enum { BLOCK = 32 };

/* of top_k.c */
void expertier_best_of_many(const float *score, int64_t R, int64_t K, float *best, int64_t *id);

union word { uint32_t bits; float number; };

/* e^x of x <= 0, to the last bit or two; what is below -87 counts as that. */
static inline float exponential(float x) {
    union word low = {.number = -87.0f}, own = {.number = x};
    own.bits = own.bits < low.bits ? own.bits : low.bits; /* of integers, which compilers make no branch of */
    int32_t power = (int32_t)(own.number * 1.44269504f - 0.5f);
    float rest = own.number - power * 0.693145752f - power * 1.42860677e-6f;
    float sum = 1.98412698e-4f;
    sum = sum * rest + 1.38888889e-3f;
    sum = sum * rest + 8.33333333e-3f;
    sum = sum * rest + 4.16666667e-2f;
    sum = sum * rest + 1.66666667e-1f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    union word scale = {.bits = (uint32_t)(power + 127) << 23};
    return sum * scale.number;
}

/* Adds the softmax of scores to `total`; gives its entropy. */
static double add_softmax(const float *score, float most, int64_t M, float *share, float *total) {
    float sum = 0, weighed = 0;
#pragma omp simd reduction(+ : sum, weighed)
    for (int64_t m = 0; m < M; m++) {
        float below = score[m] - most, own = exponential(below);
        share[m] = own;
        sum += own;
        weighed += own * below;
    }
    float scale = 1 / sum;
#pragma omp simd
    for (int64_t m = 0; m < M; m++) total[m] += scale * share[m];
    return logf(sum) - weighed * scale;
}

static const float *scores_of(const struct grid *g, int side, int64_t n, float *projected) {
    const float *first = g->part + (side * g->r * g->n + n) * g->M;
    if (g->proxy == NULL) return first;
    for (int64_t r = 0; r < g->r; r++) {
        const float *part = first + r * g->n * g->M;
        float by = g->proxy[side * g->r + r];
#pragma omp simd
        for (int64_t m = 0; m < g->M; m++) projected[m] = r ? projected[m] + by * part[m] : by * part[m];
    }
    return projected;
}

static void score_pairs(const struct grid *g, const struct room *at) {
    float *pair = at->pair;
    for (int64_t k = 0; k < g->K; pair += g->columns[k++]) {
        if (g->core == NULL)
            for (int64_t c = 0; c < g->columns[k]; c++) pair[c] = at->parts[0][k] + at->parts[1][c];
        for (int64_t s = 0; g->core != NULL && s < g->r; s++) {
            const float *column = at->parts[1] + s * g->K;
            float by = 0;
            for (int64_t r = 0; r < g->r; r++) by += at->parts[0][r * g->K + k] * g->core[r * g->r + s];
            for (int64_t c = 0; c < g->columns[k]; c++) pair[c] = s ? pair[c] + by * column[c] : by * column[c];
        }
    }
}

static double search(const struct grid *g, int64_t n, const struct room *at, float *total) {
    int64_t K = g->K;
    double entropy = 0;
    for (int side = 0; side < 2; side++) {
        const float *score = scores_of(g, side, n, at->projected);
        expertier_best_of_many(score, g->M, K, at->best[side], at->place[side]);
        for (int64_t r = 0; r < g->r; r++) {
            const float *part = g->part + ((side * g->r + r) * g->n + n) * g->M;
            for (int64_t k = 0; k < K; k++) at->parts[side][r * K + k] = part[at->place[side][k]];
        }
        if (g->is_valid == NULL || g->is_valid[n])
            entropy += add_softmax(score, at->best[side][0], g->M, at->share, total + side * g->M);
    }
    score_pairs(g, at);
    expertier_best_of_many(at->pair, g->P, K, at->pair_best, at->chosen);
    for (int64_t k = 0; k < K; k++) {
        int64_t rank[2] = {at->rank[0][at->chosen[k]], at->rank[1][at->chosen[k]]};
        g->row[n * K + k] = at->place[0][rank[0]];
        g->column[n * K + k] = at->place[1][rank[1]];
        g->score[n * K + k] = at->pair[at->chosen[k]];
        for (int64_t side = 0; side < 2 && g->picked; side++)
            for (int64_t r = 0; r < g->r; r++)
                g->picked[((side * g->r + r) * g->n + n) * K + k] = at->parts[side][r * K + rank[side]];
    }
    return entropy;
}

/* The memory that `at` is laid out in, to be freed. */
static void *lay_out(const struct grid *g, struct room *at) {
    int64_t floats = 2 * g->M + g->K * (3 + 2 * g->r) + g->P;
    int64_t *places = malloc(3 * g->K * sizeof(int64_t) + floats * sizeof(float) + 2 * g->P * sizeof(int32_t));
    if (places == NULL) return NULL;
    float *next = (float *)(places + 3 * g->K);
    for (int side = 0; side < 2; side++) {
        at->place[side] = places + side * g->K;
        at->best[side] = next, next += g->K;
        at->parts[side] = next, next += g->r * g->K;
    }
    at->chosen = places + 2 * g->K;
    at->pair_best = next, next += g->K;
    at->pair = next, next += g->P;
    at->projected = next, next += g->M;
    at->share = next, next += g->M;
    for (int side = 0; side < 2; side++) at->rank[side] = (int32_t *)next + side * g->P;
    for (int64_t k = 0, p = 0; k < g->K; k++)
        for (int64_t c = 0; c < g->columns[k]; c++, p++) at->rank[0][p] = k, at->rank[1][p] = c;
    return places;
}

int64_t expertier_grid_block(void) { return BLOCK; }

/* 0, or 1 without memory. */
int expertier_grid_best(const struct grid *g) {
    int failed = 0;
    int64_t blocks = (g->n + BLOCK - 1) / BLOCK;
#pragma omp parallel reduction(| : failed) if (blocks > 1)
    {
        struct room at = {0};
        void *memory = lay_out(g, &at);
        failed = memory == NULL;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float *total = g->total + block * 2 * g->M;
            memset(total, 0, 2 * g->M * sizeof(float));
            g->entropy[block] = 0;
            int64_t end = (block + 1) * BLOCK < g->n ? (block + 1) * BLOCK : g->n;
            for (int64_t n = block * BLOCK; n < end && !failed; n++) g->entropy[block] += search(g, n, &at, total);
        }
        free(memory);
    }
    return failed;
}
