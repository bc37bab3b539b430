/* The best experts of each token. Few scores: LANES tokens side by side, whose lists are kept sorted while their scores
   pass by. Many: one token at a time; only scores that reach a bound are sorted. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { LANES = 16 };

/* Products R K from which one token at a time pays, scores per place of the list from which most blocks are left out. */
enum { FEWEST_STEPS = 4096, SCORES_PER_PLACE = 8 };

/* Scores that reach the bound, at most, if they are to be sorted by counting; scores that are read at a time. */
enum { CANDIDATES = 256, BLOCK = 32 };

typedef float scores __attribute__((vector_size(4 * LANES)));
typedef int32_t ids __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4)));

static const ids NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

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

static int top_of_few(const float *score, int64_t T, int64_t R, int64_t K, int64_t *expert) {
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

static float or_lowest(float score) { return score == score ? score : -INFINITY; }

/* The K-th best score is at least the least of K groups' best, or of more groups'. An odd number of them does not
   coincide with the rows or columns of a grid, whose best differ much. */
static float bound_of(const float *score, int64_t R, int64_t groups, float *best) {
    for (int64_t k = 0; k < groups; k++) best[k] = -INFINITY;
    for (int64_t first = 0; first < R; first += groups) {
        int64_t group = R - first < groups ? R - first : groups;
#pragma omp simd
        for (int64_t k = 0; k < group; k++) best[k] = score[first + k] > best[k] ? score[first + k] : best[k];
    }
    float bound = INFINITY;
    for (int64_t k = 0; k < groups; k++) bound = best[k] < bound ? best[k] : bound;
    return bound;
}

/* Scores that reach a bound, in their order; more than CANDIDATES if there are too many. No branch depends on a score:
   it would be foretold wrongly twice for each candidate. */
static int64_t reaching(const float *score, int64_t R, float bound, float *candidate, int32_t *id) {
    int64_t length = 0;
    for (int64_t first = 0; first < R; first += BLOCK) {
        int64_t end = first + BLOCK < R ? first + BLOCK : R;
        if (length + end - first > CANDIDATES) return CANDIDATES + 1;
        int64_t r = first;
#ifdef __AVX512F__
        for (; r + LANES <= end; r += LANES) {
            __m512 own = _mm512_loadu_ps(score + r);
            __mmask16 reaches = _mm512_cmp_ps_mask(own, _mm512_set1_ps(bound), _CMP_NLT_UQ);
            own = _mm512_mask_mov_ps(own, _mm512_cmp_ps_mask(own, own, _CMP_UNORD_Q), _mm512_set1_ps(-INFINITY));
            _mm512_storeu_ps(candidate + length, _mm512_maskz_compress_ps(reaches, own));
            _mm512_storeu_si512(id + length, _mm512_maskz_compress_epi32(reaches, (__m512i)(NUMBERS + (int32_t)r)));
            length += __builtin_popcount(reaches);
        }
#endif
        for (; r < end; r++) {
            candidate[length] = or_lowest(score[r]);
            id[length] = r;
            length += !(score[r] < bound);
        }
    }
    return length;
}

/* Every candidate counts those that go before it. */
static void sort(float *candidate, const int32_t *id, int64_t length, int64_t K, float *best, int64_t *best_id) {
    float sorted[CANDIDATES + LANES];
    int32_t sorted_id[CANDIDATES + LANES];
    for (int64_t i = length; i < length + LANES; i++) candidate[i] = -INFINITY;
    for (int64_t first = 0; first < length; first += LANES) {
        scores own = *(const unaligned *)(candidate + first);
        ids place = {};
        int64_t next = first + LANES < length ? first + LANES : length;
        for (int64_t i = 0; i < first; i++) place -= candidate[i] >= own;
        for (int64_t i = first; i < next; i++)
            place -= (candidate[i] > own) | ((candidate[i] == own) & ((int32_t)(i - first) < NUMBERS));
        for (int64_t i = next; i < length; i++) place -= candidate[i] > own;
        for (int64_t i = first; i < next; i++) {
            sorted[place[i - first]] = candidate[i];
            sorted_id[place[i - first]] = id[i];
        }
    }
    for (int64_t k = 0; k < K; k++) best[k] = sorted[k], best_id[k] = sorted_id[k];
}

/* Of one token; grid_best.c calls it too. */
void expertier_best_of_many(const float *score, int64_t R, int64_t K, float *best, int64_t *id) {
    float candidate[CANDIDATES + LANES], bound = -INFINITY;
    int32_t candidate_id[CANDIDATES + LANES];
    int64_t length = 0, groups = R > K ? K | 1 : K;
    if (groups <= CANDIDATES) bound = bound_of(score, R, groups, candidate);
    if ((length = reaching(score, R, bound, candidate, candidate_id)) <= CANDIDATES) {
        sort(candidate, candidate_id, length, K, best, id);
        return;
    }
    length = 0;
    for (int64_t r = 0; r < R; r++) {
        float own = or_lowest(score[r]);
        if (length < K ? own < bound : !(own > best[K - 1])) continue;
        int64_t place = length < K ? length++ : K - 1;
        for (; place > 0 && own > best[place - 1]; place--) {
            best[place] = best[place - 1];
            id[place] = id[place - 1];
        }
        best[place] = own;
        id[place] = r;
    }
}

static int top_of_many(const float *score, int64_t T, int64_t R, int64_t K, int64_t *expert) {
    int failed = 0;
#pragma omp parallel reduction(| : failed) if (T * R > 1 << 15)
    {
        float *best = malloc(K * sizeof(float));
        failed = best == NULL;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++)
            if (!failed) expertier_best_of_many(score + t * R, R, K, best, expert + t * K);
        free(best);
    }
    return failed;
}

/* The K highest of R scores of each of T tokens, best first; equal scores by id, lowest first; NaN counts as the lowest,
   because nothing compares with it and the lists would lose their order. 0, or 1 without memory. */
int expertier_top_experts(const float *score, int64_t T, int64_t R, int64_t K, int64_t *expert) {
    int is_many = R * K >= FEWEST_STEPS && R >= SCORES_PER_PLACE * K;
    return (is_many ? top_of_many : top_of_few)(score, T, R, K, expert);
}
