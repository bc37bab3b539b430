/* What surrounds the experts of a decoder layer, for one token: one call, or two calls with attention between them.

   Sums, roundings and their order are those of `expertier_multiply`, `expertier_rms_norm` and `expertier_rotate`. */

#include "attend.h"
#include "router.h"

#include "../bfloat16.h"
#include "../calls.h"

#include <stddef.h>
#include <string.h>

/* A norm over rows of `width` numbers; there is none if `weight` is NULL. */
struct norm {
    const uint16_t *weight;
    int64_t width;
    float epsilon;
    int rounds_first;
};

struct decoder_layer {
    int64_t width, rotated; /* `rotated` columns of each head, as in `expertier_rotate` */
    struct heads heads;
    struct norm before, query, key, after;
    struct siblings inputs; /* queries, keys, values */
    struct siblings output;
    struct router router;
};

/* Where a layer's keys or values of the new token go: heads lie `stride` numbers apart. */
struct place {
    uint16_t *first;
    int64_t stride;
};

static void norm_rows(const struct norm *norm, const uint16_t *x, uint16_t *y, int64_t count) {
    expertier_rms_norm(norm->rounds_first, x, norm->weight, norm->epsilon, y, count / norm->width, norm->width);
}

static void put_heads(const uint16_t *from, int64_t heads, int64_t width, const struct place *to) {
    for (int64_t head = 0; head < heads; head++)
        memcpy(to->first + head * to->stride, from + head * width, (size_t)width * sizeof *from);
}

/* From a token's hidden numbers to its rotated queries [heads, head width], with its rotated keys and its values in the cache.
   `angles` are those of `expertier_rotate`. */
void expertier_begin_attention(const struct decoder_layer *layer, const uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                               int64_t angles, uint16_t *query, const struct place *key, const struct place *value) {
    int64_t width = layer->heads.width, queries = layer->heads.heads * width, keys = layer->heads.shared_heads * width;
    uint16_t normed[layer->width], made[2 * queries + 3 * keys];
    uint16_t *q = made, *k = q + queries, *v = k + keys, *normed_q = v + keys, *normed_k = normed_q + queries;
    norm_rows(&layer->before, x, normed, layer->width);
    multiply_siblings(&layer->inputs, normed, (uint16_t *const[]){q, k, v});
    if (layer->query.weight) norm_rows(&layer->query, q, normed_q, queries), q = normed_q;
    if (layer->key.weight) norm_rows(&layer->key, k, normed_k, keys), k = normed_k;
    expertier_rotate(q, query, layer->heads.heads, width, layer->rotated, cos, sin, angles);
    uint16_t *rotated = k == normed_k ? made + queries : normed_k;
    expertier_rotate(k, rotated, layer->heads.shared_heads, width, layer->rotated, cos, sin, angles);
    put_heads(rotated, layer->heads.shared_heads, width, key);
    put_heads(v, layer->heads.shared_heads, width, value);
}

/* From what the heads attended to: `sum` is x with the layer's own contribution, `normed` what its feed-forward reads, `logits` what
   its router says if that is not NULL; all but `logits` have the layer's width. The rest is as for `expertier_route`. */
int expertier_end_attention(const struct decoder_layer *layer, const uint16_t *x, const uint16_t *attended, uint16_t *sum,
                            uint16_t *normed, void *logits, int64_t *expert, void *weight) {
    multiply_siblings(&layer->output, attended, (uint16_t *const[]){sum});
    for (int64_t i = 0; i < layer->width; i++) sum[i] = round_bf16(load_bf16(x[i]) + load_bf16(sum[i]));
    norm_rows(&layer->after, sum, normed, layer->width);
    return logits && expertier_route(&layer->router, normed, logits, expert, weight);
}

/* Both of the above, with attention to `positions` tokens between them, the new one included; `query` and `attended` are rooms. */
int expertier_attention(const struct decoder_layer *layer, const uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                        int64_t angles, const struct place *key, const struct place *value, int64_t positions, uint16_t *query,
                        uint16_t *attended, uint16_t *sum, uint16_t *normed, void *logits, int64_t *expert, void *weight) {
    int64_t before = (positions - 1) * layer->heads.width;
    const struct cached keys = {key->first - before, key->stride}, values = {value->first - before, value->stride};
    expertier_begin_attention(layer, x, cos, sin, angles, query, key, value);
    expertier_attend(&layer->heads, positions, query, &keys, &values, attended);
    return expertier_end_attention(layer, x, attended, sum, normed, logits, expert, weight);
}
