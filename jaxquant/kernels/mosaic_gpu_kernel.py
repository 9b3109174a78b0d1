"""The Mosaic GPU program of `kernels.mosaic_gpu`: float inputs times int4 or int8 weights, on Hopper.

It computes the transposed product W xᵀ, because only the left operand of `wgmma` may come from registers, where codes
become floats. One warpgroup loads (TMA), the others multiply 64 outputs each. Every processor works through its share
of the steps along K, in the order of the tiles (`Schedule`); where it has only a part of a tile's steps, it writes a
partial sum.

    per channel    the sum is scaled once, when it is complete
    per group      tile_m < 64: the sum of each step is scaled, which is cheaper than scaling weights
                   else: weights are scaled before they are multiplied, which is cheaper than a second accumulator

The registers that hold the left operand must not be written to before `wgmma` has read them: each step waits for its
own, and meanwhile another warpgroup has the tensor cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxquant.kernels.mosaic_gpu_schedule import Schedule, schedule_of
from jaxquant.kernels.tuning import GpuChip, GpuTiles

ROWS = 64  # outputs of one warpgroup: what one `wgmma` takes
PRE_SCALED = 64  # tokens from which on weights are scaled, and not sums
REGISTERS = {2: (232, 40), 4: (112, 32)}  # of the warpgroups that multiply, by their number, and of the one that loads
BARRIERS = 1024  # bytes of shared memory, generously


def product(
    x: jax.Array, values: jax.Array, scale: jax.Array, tiles: GpuTiles, chip: GpuChip, dtype, interpret=None
) -> jax.Array:
    """`x · (values · scale)ᵀ`, summed in float32.

    Args:
      x: bfloat16 or float16 `[M, K]`, with K a multiple of `tile_k`.
      values: int4 or int8 `[N, K]`, with N a multiple of `tile_n`.
      scale: bfloat16, float16 or float32 `[G, N]`, with groups that are multiples of `tile_k`.
      tiles: how the product is cut.
      chip: what it is cut for.
      dtype: of the result.
      interpret: an `InterpretGPUParams` for tests; None compiles.

    Returns:
      `[M, N]`.
    """
    (m, k), n = x.shape, len(values)
    x = jnp.pad(x, ((0, -m % tiles.tile_m), (0, 0)))
    schedule = schedule_of(len(x), k, n, jnp.iinfo(values.dtype).bits, tiles, chip)
    sharers = schedule.sharers
    parts = int(sharers.max())
    parts_dtype = dtype if parts == 1 and dtype == x.dtype else jnp.float32
    found = _partial_products(x, values, scale, tiles, chip, schedule, parts_dtype, interpret)
    if parts > 1:
        shape = (parts, len(x) // tiles.tile_m, tiles.tile_m, n // tiles.tile_n, tiles.tile_n)
        written = np.arange(parts)[:, None] < sharers  # [P, tiles], of which those with the same outputs are adjacent
        written = written.reshape(parts, shape[3], shape[1]).swapaxes(1, 2)[:, :, None, :, None]
        found = jnp.sum(jnp.where(written, found.reshape(shape), 0), 0).reshape(-1, n)
    return found.reshape(-1, n)[:m].astype(dtype)


def _stages(tiles: GpuTiles, chip: GpuChip, bits: int, scale_bytes: int, out_bytes: int) -> int:
    """How many steps may be under way, for which shared memory has room."""
    step = tiles.tile_k * (tiles.tile_n * bits // 8 + tiles.tile_m * 2) + tiles.tile_n * scale_bytes
    room = chip.shared_memory - BARRIERS - tiles.tile_m * tiles.tile_n * out_bytes
    return min(tiles.stages, room // step)


def _partial_products(x, values, scale, tiles: GpuTiles, chip: GpuChip, schedule: Schedule, dtype, interpret):
    """The sums of `product` in parts, `[P, M, N]`, with P the most processors that a tile has.

    Where a tile has fewer, what its last entries hold is arbitrary.
    """
    (m, k), n, groups = x.shape, values.shape[0], scale.shape[0]
    tile_m, tile_n, tile_k = tiles.tile_m, tiles.tile_n, tiles.tile_k
    workers, m_tiles, steps_per_group = tile_n // ROWS, m // tile_m, k // groups // tile_k
    bits = jnp.iinfo(values.dtype).bits
    packed = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}[bits]
    stages = _stages(tiles, chip, bits, scale.dtype.itemsize, jnp.dtype(dtype).itemsize)
    per_channel, pre_scaled = groups == 1, groups > 1 and tile_m >= PRE_SCALED

    def kernel(x_hbm, w_hbm, s_hbm, out_hbm, x_s, w_s, s_s, out_s, full, empty, left_s=None):
        worker = lax.axis_index("warpgroup")
        count, part = schedule.runs(lax.axis_index("processor"))

        def of_all_parts(body):
            """Runs `body(tokens, outputs, low, high, partial, done)` for each part; `done` steps were before.

            Returns the number of all steps.
            """

            def one(i, done):
                tile, low, high, partial = part(i)
                tokens, outputs = lax.rem(tile, m_tiles) * tile_m, lax.div(tile, m_tiles) * tile_n
                body(tokens, outputs, low, high, partial, done)
                return done + high - low

            return lax.fori_loop(0, count, one, jnp.int32(0))

        def fragment(ref, layout, **how):
            return plgpu.load(ref, layout=layout, **how)

        def scales(ref, **how):
            found = fragment(ref, plgpu.Layout.WGMMA.reduce(1), **how)
            return lambda shape, dtype: lax.broadcast_in_dim(found.astype(dtype), shape, [0])

        def weights(stage):
            codes = fragment(w_s.at[stage, pl.ds(worker * ROWS, ROWS)], packed)
            w = plgpu.layout_cast(codes, plgpu.Layout.WGMMA).astype(jnp.bfloat16)  # the fast conversion, and exact
            wide = x.dtype if not pre_scaled or scale.dtype == x.dtype else jnp.float32
            if wide != jnp.bfloat16:
                w = w.astype(jnp.float32).astype(wide)
            if pre_scaled:
                w *= scales(s_s.at[stage, pl.ds(worker * ROWS, ROWS)])(w.shape, wide)
            return w.astype(x.dtype)

        def multiply(acc, stage):
            w = weights(stage)
            if interpret is not None:  # the interpreter does not know `wgmma` from registers
                left_s[worker] = w
                plgpu.commit_smem()
                w = left_s.at[worker]
            plgpu.wgmma(acc, w, x_s.at[stage].T)
            plgpu.wgmma_wait(0)

        def in_one_accumulator(high, low, done):
            def accumulate(acc):
                def step(j, _):
                    stage = lax.rem(done + j, stages)
                    plgpu.barrier_wait(full.at[stage])
                    multiply(acc, stage)
                    plgpu.barrier_arrive(empty.at[stage])
                    return ()

                lax.fori_loop(0, high - low, step, ())
                return acc[...]

            return pl.run_scoped(accumulate, plgpu.ACC((ROWS, tile_m)))

        def step_by_step(high, low, done):
            def step(j, total):
                stage = lax.rem(done + j, stages)
                plgpu.barrier_wait(full.at[stage])
                scale = scales(s_s.at[stage, pl.ds(worker * ROWS, ROWS)])

                def accumulate(acc):
                    multiply(acc, stage)
                    return acc[...]

                found = pl.run_scoped(accumulate, plgpu.ACC((ROWS, tile_m)))
                plgpu.barrier_arrive(empty.at[stage])
                return total + found * scale(found.shape, jnp.float32)

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, tile_m), jnp.float32), plgpu.Layout.WGMMA)
            return lax.fori_loop(0, high - low, step, zeros)

        @pl.when(worker < workers)
        def _compute():
            plgpu.set_max_registers(REGISTERS[workers][0], action="increase")

            def tile(tokens, outputs, low, high, partial, done):
                rows = pl.ds(outputs + worker * ROWS, ROWS)
                total = (in_one_accumulator if per_channel or pre_scaled else step_by_step)(high, low, done)
                if per_channel:
                    total *= scales(s_hbm.at[0, rows], optimized=False)(total.shape, jnp.float32)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s.at[worker].T[...] = plgpu.layout_cast(total.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_s.at[worker], out_hbm.at[partial, pl.ds(tokens, tile_m), rows])

            of_all_parts(tile)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(worker == workers)
        def _load():
            plgpu.set_max_registers(REGISTERS[workers][1], action="decrease")

            def tile(tokens, outputs, low, high, partial, done):
                del partial
                rows = pl.ds(outputs, tile_n)

                def step(j, _):
                    stage = lax.rem(done + j, stages)

                    @pl.when(done + j >= stages)
                    def _wait():
                        plgpu.barrier_wait(empty.at[stage])

                    at = pl.ds((low + j) * tile_k, tile_k)
                    plgpu.copy_gmem_to_smem(w_hbm.at[rows, at], w_s.at[stage], full.at[stage])
                    plgpu.copy_gmem_to_smem(x_hbm.at[pl.ds(tokens, tile_m), at], x_s.at[stage], full.at[stage])
                    if not per_channel:
                        group = lax.div(low + j, steps_per_group)
                        plgpu.copy_gmem_to_smem(s_hbm.at[group, rows], s_s.at[stage], full.at[stage])
                    return ()

                lax.fori_loop(0, high - low, step, ())

            done = of_all_parts(tile)

            def drain(j, _):  # a barrier must not outlive what it waits for
                plgpu.barrier_wait(empty.at[lax.rem(j, stages)])
                return ()

            lax.fori_loop(jnp.maximum(done - stages, 0), done, drain, ())

    memory = {
        "x_s": _shared((stages, tile_m, tile_k), x.dtype),
        "w_s": _shared((stages, tile_n, tile_k), values.dtype),
        "s_s": plgpu.SMEM((stages, tile_n), scale.dtype),
        "out_s": _shared((workers, tile_m, ROWS), dtype),
        "full": plgpu.Barrier(num_barriers=stages, num_arrivals=2 if per_channel else 3),
        "empty": plgpu.Barrier(num_barriers=stages, num_arrivals=workers),
    }
    if interpret is not None:
        memory["left_s"] = _shared((workers, ROWS, tile_k), x.dtype)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((int(schedule.sharers.max()), m, n), dtype),
        scratch_types=memory,
        grid=(schedule.processors,),
        grid_names=("processor",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        kernel_name=f"jaxquant_w{bits}a16",
        **({} if interpret is None else {"interpret": interpret}),
    )(x, values, scale)


def _shared(shape, dtype):
    """Shared memory whose rows are swizzled, so that TMA writes what `wgmma` and the fragment loads read."""
    bits = jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, 8 * swizzle // bits)), plgpu.SwizzleTransform(swizzle))
    )
