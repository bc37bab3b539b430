/* The best experts of each token: LANES tokens side by side, whose lists are kept sorted while their scores pass by. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { LANES = 16 };

typedef float scores __attribute__((vector_size(4 * LANES)));
typedef int32_t ids __attribute__((vector_size(4 * LANES)));

static scores choose_score(ids is, scores a, scores b) { return (scores)(((ids)a & is) | ((ids)b & ~is)); }
static ids choose_id(ids is, ids a, ids b) { return (a & is) | (b & ~is); }

/* A score that beats nobody goes behind its equals, so that these stay in the order of their ids. */
static void insert(scores score, int32_t expert, int64_t length, int is_growing, scores *best_score, ids *best_id) {
    ids id = (ids){} + expert;
    int64_t last = length - 1;
    ids beats = is_growing ? (ids){} - 1 : score > best_score[last];
    for (int64_t k = last; k > 0; k--) {
        ids beats_above = score > best_score[k - 1];
        best_score[k] = choose_score(beats_above, best_score[k - 1], choose_score(beats, score, best_score[k]));
        best_id[k] = choose_id(beats_above, best_id[k - 1], choose_id(beats, id, best_id[k]));
        beats = beats_above;
    }
    best_score[0] = choose_score(beats, score, best_score[0]);
    best_id[0] = choose_id(beats, id, best_id[0]);
}

/* The K highest of R scores of each of T tokens, best first; equal scores by id, lowest first; NaN counts as the lowest,
   because nothing compares with it and the lists would lose their order. 0, or 1 without memory. */
int expertier_top_experts(const float *score, int64_t T, int64_t R, int64_t K, int64_t *expert) {
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (T > 8 * LANES)
    {
        scores *column = aligned_alloc(sizeof(scores), (R + 2 * K) * sizeof(scores));
        scores *best_score = column + R;
        ids *best_id = (ids *)(best_score + K);
        failed = column == NULL;
#pragma omp for schedule(dynamic, 8)
        for (int64_t t0 = 0; t0 < T; t0 += LANES) {
            if (failed) continue;
            int64_t rows = T - t0 < LANES ? T - t0 : LANES;
            for (int64_t i = 0; i < LANES; i++)
                for (int64_t r = 0; r < R; r++) {
                    float own = score[(t0 + (i < rows ? i : 0)) * R + r];
                    column[r][i] = own == own ? own : -INFINITY;
                }
            for (int64_t r = 0; r < R; r++) insert(column[r], r, r < K ? r + 1 : K, r < K, best_score, best_id);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t k = 0; k < K; k++) expert[(t0 + i) * K + k] = best_id[k][i];
        }
        free(column);
    }
    return failed;
}
