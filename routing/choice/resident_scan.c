/* Resident sets along sequences: the first token chooses a set, every later one swaps at most one expert. */

#include <math.h>
#include <stdint.h>
#include <string.h>

static void choose(const float *score, int64_t E, int64_t residents, uint8_t *is_in) {
    for (int64_t n = 0; n < residents; n++) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; e++)
            if (!is_in[e] && (best < 0 || score[e] > score[best])) best = e;
        is_in[best] = 1;
    }
}

/* Equal scores go to the lower id: of equal residents the one with the highest id goes. */
static void swap(const float *score, int64_t E, int64_t rank, float margin, uint8_t *is_in) {
    int64_t best = -1, worst = -1, unbeaten = 0;
    for (int64_t e = 0; e < E; e++) {
        if (is_in[e]) {
            if (worst < 0 || score[e] <= score[worst]) worst = e;
        } else if (best < 0 || score[e] > score[best]) {
            best = e;
        }
    }
    if (best < 0) return;
    for (int64_t e = 0; e < E; e++) unbeaten += is_in[e] && !(score[best] > score[e] + margin);
    if (unbeaten < rank) is_in[best] = 1, is_in[worst] = 0;
}

void expertier_resident_scan(const float *score, const uint8_t *is_valid, const uint8_t *before, uint8_t *after,
                             int64_t B, int64_t S, int64_t E, int64_t residents, int64_t rank, float margin) {
#pragma omp parallel for if (B * S * E > 1 << 18)
    for (int64_t b = 0; b < B; b++) {
        const uint8_t *last = before + b * E;
        int has_begun = memchr(last, 1, E) != NULL;
        for (int64_t s = b * S; s < (b + 1) * S; s++) {
            uint8_t *is_in = after + s * E;
            memcpy(is_in, last, E);
            if (is_valid[s] && has_begun) swap(score + s * E, E, rank, margin, is_in);
            if (is_valid[s] && !has_begun) choose(score + s * E, E, residents, is_in), has_begun = 1;
            last = is_in;
        }
    }
}
