/* See choice.h. Sources of the orders, of PyTorch: aten/src/ATen/native/cpu/SoftMaxKernel.cpp (softmax), UnaryOpsKernel.cpp and
   Loops.h (sigmoid), TopKImpl.h (which of equal scores are chosen), ATen/cpu/vec (exp); and of the GNU C++ library:
   bits/stl_algo.h (nth_element). This file must be compiled without contraction of products and sums. */

#include "choice.h"

#include "../bfloat16.h"
#include "../calls.h"

#include <math.h>

/* --- scores ------------------------------------------------------------------------------------------------------- */

static inline float power_of_two(int32_t power) {
    uint32_t bits = (uint32_t)(power + 127) << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* exp(x) = 2^n exp(x - n ln 2), a polynomial of degree 7 in the rest. */
static inline float vector_exp(float x) {
    float n = rintf(x * 0x1.715476p+0f), rest = fmaf(n, -0x1.62e4p-1f, x);
    rest = fmaf(n, -0x1.7f7d1cp-20f, rest);
    float y = fmaf(0.000198527617612853646278381f, rest, 0.00139304355252534151077271f);
    y = fmaf(y, rest, 0.00833336077630519866943359f);
    y = fmaf(y, rest, 0.0416664853692054748535156f);
    y = fmaf(y, rest, 0.166666671633720397949219f);
    y = fmaf(y, rest, 0.5f);
    y = 1.0f + fmaf(rest * rest, y, rest);
    int32_t whole = (int32_t)fminf(fmaxf(n, -160.0f), 160.0f), half = whole >> 1;
    return x < -104.0f ? 0.0f : x > 100.0f ? INFINITY : y * power_of_two(half) * power_of_two(whole - half);
}

static float largest_of(const float *value, int64_t count) {
    float most = value[0];
    for (int64_t i = 1; i < count; i++) most = value[i] > most ? value[i] : most;
    return most;
}

/* Number i is added to sum i % lanes; halves of the sums are added to each other. */
static float add_side_by_side(const float *value, int64_t count, int lanes) {
    float sum[MOST_LANES] = {value[0]};
    if (count < lanes) {
        for (int64_t i = 1; i < count; i++) sum[0] += value[i];
        return sum[0];
    }
    memcpy(sum, value, (size_t)lanes * sizeof *sum);
    for (int64_t i = lanes; i < count; i++) sum[i & (lanes - 1)] += value[i];
    for (int half = lanes / 2; half; half /= 2)
        for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
    return sum[0];
}

static void softmax(float *value, int64_t count, int lanes) {
    float most = largest_of(value, count);
    for (int64_t i = 0; i < count; i++) value[i] = vector_exp(value[i] - most);
    float scale = 1.0f / add_side_by_side(value, count, lanes);
    for (int64_t i = 0; i < count; i++) value[i] *= scale;
}

/* That of a few bfloat16 numbers, fewer than torch takes side by side. */
static void softmax_of_few(float *value, int64_t count) {
    float most = largest_of(value, count), sum = 0;
    for (int64_t i = 0; i < count; i++) sum += value[i] = expf(value[i] - most);
    for (int64_t i = 0; i < count; i++) value[i] = load_bf16(round_bf16(value[i] / sum));
}

/* Whole pairs of registers are computed side by side, and the rest one by one. */
static void sigmoid(float *value, int64_t count, int lanes) {
    int64_t whole = count - count % (2 * lanes);
    for (int64_t i = 0; i < whole; i++) value[i] = 1.0f / (1.0f + vector_exp(0.0f - value[i]));
    for (int64_t i = whole; i < count; i++) value[i] = 1.0f / (1.0f + expf(-value[i]));
}

/* --- the largest -------------------------------------------------------------------------------------------------- */

struct scored {
    float score;
    int32_t expert;
};

static inline void swap(struct scored *a, struct scored *b) {
    struct scored kept = *a;
    *a = *b;
    *b = kept;
}

/* Larger scores come first; equal ones keep their order. */
static void sort_few(struct scored *first, int64_t count) {
    for (int64_t i = 1; i < count; i++) {
        struct scored moved = first[i];
        int64_t place = i;
        for (; place > 0 && moved.score > first[place - 1].score; place--) first[place] = first[place - 1];
        first[place] = moved;
    }
}

/* Brings the median of three to `to`. */
static void take_median(struct scored *to, struct scored *a, struct scored *b, struct scored *c) {
    if (a->score > b->score)
        swap(to, b->score > c->score ? b : a->score > c->score ? c : a);
    else
        swap(to, a->score > c->score ? a : b->score > c->score ? c : b);
}

/* Scores that are at least the pivot's come before those that are at most that; where the second ones begin. */
static int64_t part(struct scored *at, int64_t first, int64_t last, float pivot) {
    for (;; first++) {
        while (at[first].score > pivot) first++;
        for (last--; pivot > at[last].score;) last--;
        if (first >= last) return first;
        swap(&at[first], &at[last]);
    }
}

/* The largest come first, in torch's order of equal ones. 0 if the parts do not get small soon, where torch would go on otherwise. */
static int bring_largest(struct scored *at, int64_t count, int64_t chosen, int is_sorted) {
    int64_t first = 0, last = count;
    int turns = 2 * (63 - __builtin_clzll((uint64_t)count));
    while (last - first > 3) {
        if (turns-- == 0) return 0;
        take_median(&at[first], &at[first + 1], &at[first + (last - first) / 2], &at[last - 1]);
        int64_t cut = part(at, first + 1, last, at[first].score);
        if (cut <= chosen - 1)
            first = cut;
        else
            last = cut;
    }
    sort_few(at + first, last - first);
    if (is_sorted) sort_few(at, chosen - 1);
    return 1;
}

static float best_of(const float *score, int64_t count, int64_t best) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t i = 0; i < count; i++)
        if (score[i] > first)
            second = first, first = score[i];
        else if (score[i] > second)
            second = score[i];
    return best == 1 ? first : first + second;
}

/* Scores outside the best groups become `masked`; 0 as above. */
static int mask_groups(const struct choice *how, float *score) {
    int64_t groups = how->groups, size = how->experts / groups;
    struct scored order[groups];
    for (int64_t g = 0; g < groups; g++) order[g] = (struct scored){best_of(score + g * size, size, how->best_of_group), (int32_t)g};
    if (!bring_largest(order, groups, how->kept_groups, 0)) return 0;
    for (int64_t i = how->kept_groups; i < groups; i++)
        for (int64_t e = 0; e < size; e++) score[order[i].expert * size + e] = how->masked;
    return 1;
}

/* --- the choice --------------------------------------------------------------------------------------------------- */

/* The scores of a token's logits, and the numbers that are compared; 0 if one is no number. */
static int score_experts(const struct choice *how, const void *logits, float *score, float *compared) {
    int64_t experts = how->experts;
    for (int64_t i = 0; i < experts; i++)
        score[i] = how->is_wide ? ((const float *)logits)[i] : load_bf16(((const uint16_t *)logits)[i]);
    if (how->rule == SOFTMAX_FIRST) softmax(score, experts, how->lanes);
    if (how->rule == SIGMOID_FIRST) sigmoid(score, experts, how->lanes);
    for (int64_t i = 0; i < experts; i++) {
        float bias = !how->bias ? 0 : how->is_bias_wide ? ((const float *)how->bias)[i] : load_bf16(((const uint16_t *)how->bias)[i]);
        compared[i] = how->bias ? score[i] + bias : score[i];
        if (isnan(compared[i])) return 0;
    }
    return 1;
}

static void weigh(const struct choice *how, float *found) {
    int64_t chosen = how->chosen;
    if (how->rule == LARGEST_FIRST) softmax_of_few(found, chosen);
    if (how->rule == LARGEST_FIRST_WIDE) softmax(found, chosen, how->lanes);
    if (how->normalises) {
        float sum = expertier_sum(found, chosen) + how->added;
        if (sum < how->least) sum = how->least;
        for (int64_t k = 0; k < chosen; k++) found[k] /= sum;
    }
    for (int64_t k = 0; k < chosen; k++) found[k] *= how->scale;
}

/* The experts and their weights; 0 if torch has to choose: there are scores that are no numbers, or see above. */
int expertier_choose(const struct choice *how, const void *logits, int64_t *expert, void *weight) {
    int64_t experts = how->experts, chosen = how->chosen;
    float score[experts], compared[experts], found[MOST_CHOSEN];
    struct scored order[experts];
    if (!score_experts(how, logits, score, compared)) return 0;
    if (how->kept_groups < how->groups && !mask_groups(how, compared)) return 0;
    for (int64_t i = 0; i < experts; i++) order[i] = (struct scored){compared[i], (int32_t)i};
    if (!bring_largest(order, experts, chosen, how->is_sorted)) return 0;
    for (int64_t k = 0; k < chosen; k++) {
        expert[k] = order[k].expert;
        found[k] = how->is_unbiased ? score[expert[k]] : order[k].score;
    }
    weigh(how, found);
    for (int64_t k = 0; k < chosen; k++)
        if (how->is_rounded)
            ((uint16_t *)weight)[k] = round_bf16(found[k]);
        else
            ((float *)weight)[k] = found[k];
    return 1;
}
