/* A whole decoder layer of the kind that Llama, Mistral and Qwen have, for a decode step in bf16: by parts it takes
 * torch and Python longer to get from one kernel to the next than the kernels need for what is not a weight.
 *
 * x + o(attention(norm(x))) =: middle; middle + down(silu(gate(norm(middle))) * up(norm(middle))); every result is
 * rounded to bf16 where transformers' modules round it.
 */
#include <omp.h>

#include "bf16.h"

typedef struct {
    matrix_t q, k, v, o, gate, up, down;
    const bf16 *before, *after;   /* norms before attention and after it [hidden] */
    const bf16 *q_norm, *k_norm;  /* of every head [dim], or NULL */
    float before_eps, after_eps, q_eps, k_eps;
    long hidden;
} layer_t;

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long most(long a, long b) { return a > b ? a : b; }

/* What a thread has for itself, in bytes that are multiples of 64: prepared activations, normed ones, two parts of results. */
typedef struct {
    long prepared, normed, part;
} own_t;

static int forms_in(const layer_t *l)
{
    const matrix_t *const all[] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
    int forms = 0;
    for (int i = 0; i < 7; i++)
        forms |= forms_of(all[i]->form);
    return forms;
}

static own_t own_of(const layer_t *l, long M, int threads, int tiles)
{
    const long widest = most(l->hidden, most(l->gate.outputs, l->q.outputs)), unit = sizeof(bf16);
    return (own_t){
        linear_room(M, widest, tiles, forms_in(l)),
        (M * l->hidden * unit + 63) / 64 * 64,
        (M * linear_chunk(widest, threads) * unit + 63) / 64 * 64,
    };
}

static long own_bytes(own_t own) { return own.prepared + own.normed + 2 * own.part; }

/* out[m][n] = base[m][n] + projection(prepared)[m][n] for n in [begin, end). */
static void add_projection(const matrix_t *p, const prepared_t *prepared, const bf16 *base, bf16 *out, bf16 *part,
                           long begin, long end, long M, int tiles)
{
    const long N = p->outputs, width = end - begin;
    linear_columns(prepared, p, begin, width, part, M, width, tiles);
    for (long m = 0; m < M; m++)
        for (long n = 0; n < width; n += 16) {
            const long place = m * N + begin + n;
            store16(out + place, _mm512_add_ps(load16(base + place), load16(part + m * width + n)));
        }
}

/* Bytes of `work` for M tokens and so many threads. */
long raytier_layer_work_bf16(const layer_t *l, long M, int threads, int tiles)
{
    const long outputs = 2 * l->q.outputs + l->k.outputs + l->v.outputs + l->hidden + l->gate.outputs;
    return M * outputs * (long)sizeof(bf16) + own_bytes(own_of(l, M, threads, tiles)) * threads + 64;
}

/* out [tokens][hidden] of x [tokens][hidden]: single tokens all of them. cos, sin [tokens][dim]. */
void raytier_layer_bf16(const layer_t *l, const attend_t *a, const pool_t *pool, const bf16 *x, const bf16 *cos,
                        const bf16 *sin, bf16 *out, bf16 *work, int threads, int tiles)
{
    const long M = a->tokens, H = l->hidden, dim = a->dim, inner = l->gate.outputs, attended = l->q.outputs;
    const long group = a->heads / a->kv_heads;
    bf16 *q = work, *k = q + M * attended, *v = k + M * l->k.outputs, *seen = v + M * l->v.outputs;
    bf16 *middle = seen + M * attended, *active = middle + M * H;
    uint8_t *rest = (uint8_t *)(((uintptr_t)(active + M * inner) + 63) / 64 * 64);
    const own_t own = own_of(l, M, threads, tiles);
    const int forms = forms_in(l);

#pragma omp parallel num_threads(threads)
    {
        uint8_t *room = rest + own_bytes(own) * omp_get_thread_num(), *after = room + own.prepared;
        bf16 *normed = (bf16 *)after, *part = (bf16 *)(after + own.normed), *other = (bf16 *)(after + own.normed + own.part);
        linear_begin(a->tiles);

        /* Norms are computed by every thread for itself, as activations are arranged by every one. */
        for (long m = 0; m < M; m++)
            norm_row(x + m * H, l->before, normed + m * H, H, l->before_eps);
        prepared_t prepared = linear_prepare(normed, room, M, H, tiles, forms);
        const matrix_t *const parts[3] = {&l->q, &l->k, &l->v};
        bf16 *const to[3] = {q, k, v};
        for (int i = 0; i < 3; i++) {
            const matrix_t *p = parts[i];
            const long chunk = linear_chunk(p->outputs, threads);
#pragma omp for schedule(dynamic) nowait
            for (long n = 0; n < p->outputs; n += chunk)
                linear_columns(&prepared, p, n, least(chunk, p->outputs - n), to[i] + n, M, p->outputs, tiles);
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (long i = 0; i < M * a->kv_heads; i++) {
            const long t = i / a->kv_heads, h = i % a->kv_heads, place = h * pool->head + a->slots[t] * dim;
            bf16 *key = k + (t * a->kv_heads + h) * dim;
            if (l->k_norm)
                norm_row(key, l->k_norm, key, dim, l->k_eps);
            rotate(key, pool->keys + place, cos + t * dim, sin + t * dim, dim);
            memcpy(pool->values + place, v + (t * a->kv_heads + h) * dim, sizeof(bf16) * (size_t)dim);
            for (long g = h * group; g < (h + 1) * group; g++) {
                bf16 *query = q + (t * a->heads + g) * dim;
                if (l->q_norm)
                    norm_row(query, l->q_norm, query, dim, l->q_eps);
                rotate(query, query, cos + t * dim, sin + t * dim, dim);
            }
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < a->spans * a->kv_heads; i++)
            attend_task(a, pool, q, seen, i, threads);

        prepared = linear_prepare(seen, room, M, attended, tiles, forms);
        long chunk = linear_chunk(H, threads);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < H; n += chunk)
            add_projection(&l->o, &prepared, x, middle, part, n, least(n + chunk, H), M, tiles);

        for (long m = 0; m < M; m++)
            norm_row(middle + m * H, l->after, normed + m * H, H, l->after_eps);
        prepared = linear_prepare(normed, room, M, H, tiles, forms);
        chunk = linear_chunk(inner, threads);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < inner; n += chunk) {
            const long width = least(chunk, inner - n);
            const matrix_t *const both[2] = {&l->gate, &l->up};
            for (int i = 0; i < 2; i++)
                linear_columns(&prepared, both[i], n, width, i ? other : part, M, width, tiles);
            for (long m = 0; m < M; m++)
                silu_mul(part + m * width, other + m * width, active + m * inner + n, width);
        }

        prepared = linear_prepare(active, room, M, inner, tiles, forms);
        chunk = linear_chunk(H, threads);
#pragma omp for schedule(dynamic) nowait
        for (long n = 0; n < H; n += chunk)
            add_projection(&l->down, &prepared, middle, out, part, n, least(n + chunk, H), M, tiles);
        linear_end(a->tiles);
    }
}
