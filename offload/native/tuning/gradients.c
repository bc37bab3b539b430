/* Sums of bfloat16 gradients. */

#include "../bfloat16.h"

enum { AT_ONCE = 4096 };

/* sum = from[0] + from[1] + ... of `num` arrays, at least one, added in float32 and in this order. By the calling thread alone. */
void expertier_sum_gradients(const uint16_t *const *from, int64_t num, int64_t count, float *sum) {
    for (int64_t begun = 0; begun < count; begun += AT_ONCE) {
        int64_t end = count - begun < AT_ONCE ? count : begun + AT_ONCE;
        for (int64_t i = begun; i < end; i++) sum[i] = load_bf16(from[0][i]);
        for (int64_t n = 1; n < num; n++)
            for (int64_t i = begun; i < end; i++) sum[i] += load_bf16(from[n][i]);
    }
}
