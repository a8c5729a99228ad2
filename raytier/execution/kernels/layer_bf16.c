/* A whole decoder layer of the kind that Llama, Mistral and Qwen have, for a decode step in bf16: by parts it takes
 * torch and Python longer to get from one kernel to the next than the kernels need for what is not a weight.
 *
 * x + o(attention(norm(x))) =: middle; middle + down(silu(gate(norm(middle))) * up(norm(middle))); every result is
 * rounded to bf16 where transformers' modules round it.
 */
#include <omp.h>

#include "bf16.h"

typedef struct {
    const bf16 *weight, *bias; /* bias NULL: none */
    long outputs;
} projection_t;

typedef struct {
    projection_t q, k, v, o, gate, up, down;
    const bf16 *before, *after;   /* norms before attention and after it [hidden] */
    const bf16 *q_norm, *k_norm;  /* of every head [dim], or NULL */
    float before_eps, after_eps, q_eps, k_eps;
    long hidden;
} layer_t;

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long most(long a, long b) { return a > b ? a : b; }

/* Inputs of the widest projection. */
static long widest_of(const layer_t *l) { return most(l->hidden, most(l->gate.outputs, l->q.outputs)); }

/* What every thread has for itself: arranged activations, normed ones, two parts of results; a multiple of 64 bytes. */
static long own_work(const layer_t *l, long M, int threads)
{
    const long widest = widest_of(l), arranged = linear_room(M) * widest, parts = 2 * M * linear_chunk(widest, threads);
    return (arranged + M * l->hidden + parts + 31) / 32 * 32;
}

/* out[m][n] = base[m][n] + projection(prepared)[m][n] for n in [begin, end). */
static void add_projection(const projection_t *p, const bf16 *prepared, const bf16 *base, bf16 *out, bf16 *part,
                           long begin, long end, long M, long K, int tiles)
{
    const long N = p->outputs, width = end - begin;
    linear_columns(prepared, p->weight + begin * K, p->bias ? p->bias + begin : NULL, part, M, width, width, K, tiles);
    for (long m = 0; m < M; m++)
        for (long n = 0; n < width; n += 16) {
            const long place = m * N + begin + n;
            store16(out + place, _mm512_add_ps(load16(base + place), load16(part + m * width + n)));
        }
}

/* Numbers of bf16 that `work` holds, for M tokens and so many threads. */
long raytier_layer_work_bf16(const layer_t *l, long M, int threads)
{
    const long outputs = 2 * l->q.outputs + l->k.outputs + l->v.outputs + l->hidden + l->gate.outputs;
    return M * outputs + own_work(l, M, threads) * threads + 32;
}

/* out [tokens][hidden] of x [tokens][hidden]: single tokens all of them. cos, sin [tokens][dim]. */
void raytier_layer_bf16(const layer_t *l, const attend_t *a, const pool_t *pool, const bf16 *x, const bf16 *cos,
                        const bf16 *sin, bf16 *out, bf16 *work, int threads, int tiles)
{
    const long M = a->tokens, H = l->hidden, dim = a->dim, inner = l->gate.outputs, attended = l->q.outputs;
    const long group = a->heads / a->kv_heads;
    bf16 *q = work, *k = q + M * attended, *v = k + M * l->k.outputs, *seen = v + M * l->v.outputs;
    bf16 *middle = seen + M * attended, *active = middle + M * H, *rest = active + M * inner;
    const long widest = widest_of(l), own = own_work(l, M, threads);
    rest = (bf16 *)(((uintptr_t)rest + 63) / 64 * 64);

#pragma omp parallel num_threads(threads)
    {
        bf16 *room = rest + own * omp_get_thread_num(), *normed = room + linear_room(M) * widest;
        bf16 *part = normed + M * H, *other = part + M * linear_chunk(widest, threads);
        linear_begin(a->tiles);

        /* Norms are computed by every thread for itself, as activations are arranged by every one. */
        for (long m = 0; m < M; m++)
            norm_row(x + m * H, l->before, normed + m * H, H, l->before_eps);
        const bf16 *prepared = linear_prepare(normed, room, M, H, tiles);
        const projection_t *const parts[3] = {&l->q, &l->k, &l->v};
        bf16 *const to[3] = {q, k, v};
        for (int i = 0; i < 3; i++) {
            const projection_t *p = parts[i];
            const long chunk = linear_chunk(p->outputs, threads);
#pragma omp for schedule(dynamic) nowait
            for (long n = 0; n < p->outputs; n += chunk)
                linear_columns(prepared, p->weight + n * H, p->bias ? p->bias + n : NULL, to[i] + n, M,
                               least(chunk, p->outputs - n), p->outputs, H, tiles);
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

        prepared = linear_prepare(seen, room, M, attended, tiles);
        long chunk = linear_chunk(H, threads);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < H; n += chunk)
            add_projection(&l->o, prepared, x, middle, part, n, least(n + chunk, H), M, attended, tiles);

        for (long m = 0; m < M; m++)
            norm_row(middle + m * H, l->after, normed + m * H, H, l->after_eps);
        prepared = linear_prepare(normed, room, M, H, tiles);
        chunk = linear_chunk(inner, threads);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < inner; n += chunk) {
            const long width = least(chunk, inner - n);
            const projection_t *const both[2] = {&l->gate, &l->up};
            for (int i = 0; i < 2; i++)
                linear_columns(prepared, both[i]->weight + n * H, both[i]->bias ? both[i]->bias + n : NULL,
                               i ? other : part, M, width, width, H, tiles);
            for (long m = 0; m < M; m++)
                silu_mul(part + m * width, other + m * width, active + m * inner + n, width);
        }

        prepared = linear_prepare(active, room, M, inner, tiles);
        chunk = linear_chunk(H, threads);
#pragma omp for schedule(dynamic) nowait
        for (long n = 0; n < H; n += chunk)
            add_projection(&l->down, prepared, middle, out, part, n, least(n + chunk, H), M, inner, tiles);
        linear_end(a->tiles);
    }
}
