//! Every instruction set of this machine against plain arithmetic in double precision.

use proptest::prelude::*;

use super::attention::{Attend, Cached, Scratch};
use super::kernels::Kernels;
use super::rows::to_bf16;
use super::*;

fn ops(compute: Compute, isa: Isa, threads: usize) -> CpuOps {
    CpuOps::new(&CpuOptions {
        compute,
        threads,
        isa: Some(isa),
    })
    .unwrap()
}

/// Numbers that 16-bit formats hold exactly, so that every path computes from the same operands.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let small = i8::try_from((state >> 24) as i32 - 128).unwrap();
            f32::from(small) / 64.0
        })
        .collect()
}

fn matrix(ops: &CpuOps, rows: usize, columns: usize, values: &[f32]) -> Matrix {
    let mut matrix = ops.matrix(rows, columns).unwrap();
    let stride = matrix.stride;
    for (row, values) in values.chunks(columns).enumerate() {
        matrix.data.as_mut_slice()[row * stride..][..columns].copy_from_slice(values);
    }
    matrix
}

fn view<'a>(data: &'a [u8], dtype: DType, rows: usize, columns: usize) -> MatrixView<'a> {
    MatrixView {
        data,
        dtype,
        rows,
        columns,
    }
}

fn bytes(values: &[f32], dtype: DType) -> Vec<u8> {
    let encode = |&x: &f32| match dtype {
        DType::F32 => x.to_le_bytes().to_vec(),
        DType::F16 => ::half::f16::from_f32(x).to_le_bytes().to_vec(),
        DType::Bf16 => ::half::bf16::from_f32(x).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(encode).collect()
}

/// `x * w^T + bias + before`, and how large the terms are in all.
fn naive_linear(
    (rows, inputs, outputs): (usize, usize, usize),
    x: &[f32],
    w: &[f32],
    bias: &[f32],
    before: f32,
) -> Vec<(f64, f64)> {
    (0..rows * outputs)
        .map(|at| {
            let (row, output) = (at / outputs, at % outputs);
            let x = &x[row * inputs..][..inputs];
            let w = &w[output * inputs..][..inputs];
            let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let sum = terms().sum::<f64>() + f64::from(bias[output]) + f64::from(before);
            (sum, 1.0 + terms().map(f64::abs).sum::<f64>())
        })
        .collect()
}

#[derive(Debug, Clone)]
struct Shape {
    rows: usize,
    inputs: usize,
    /// Outputs of the matrices that are stacked.
    parts: Vec<usize>,
    dtype: DType,
    threads: usize,
    add: bool,
    seed: u32,
}

fn shapes() -> impl Strategy<Value = Shape> {
    (
        1_usize..40,
        1_usize..300,
        prop::collection::vec(1_usize..150, 1..4),
        prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        1_usize..4,
        any::<bool>(),
        any::<u32>(),
    )
        .prop_map(|(rows, inputs, parts, dtype, threads, add, seed)| Shape {
            rows,
            inputs,
            parts,
            dtype,
            threads,
            add,
            seed,
        })
}

fn run_linear(
    ops: &CpuOps,
    shape: &Shape,
    rows: usize,
    w: &[f32],
    x: &[f32],
    bias: &[f32],
) -> Matrix {
    let outputs = shape.parts.iter().sum();
    let data = bytes(w, shape.dtype);
    let mut rest = data.as_slice();
    let parts: Vec<_> = shape
        .parts
        .iter()
        .map(|&part| {
            let (data, after) = rest.split_at(part * shape.inputs * shape.dtype.bytes());
            rest = after;
            view(data, shape.dtype, part, shape.inputs)
        })
        .collect();
    let weight = ops.pack(&parts).unwrap();
    let bias = ops.vector(bias).unwrap();
    let mut input = ops.input(rows, shape.inputs).unwrap();
    ops.convert(rows, &matrix(ops, rows, shape.inputs, x), &mut input);
    let mut out = matrix(ops, rows, outputs, &vec![7.0; rows * outputs]);
    let mode = if shape.add {
        Output::Add
    } else {
        Output::Store
    };
    ops.linear(rows, &input, &weight, Some(&bias), mode, &mut out);
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn linear_is_exact_to_its_format(shape in shapes()) {
        let outputs: usize = shape.parts.iter().sum();
        let x = numbers(shape.rows * shape.inputs, shape.seed);
        let w = numbers(outputs * shape.inputs, shape.seed ^ 1);
        let bias = numbers(outputs, shape.seed ^ 2);
        let before = if shape.add { 7.0 } else { 0.0 };
        let size = (shape.rows, shape.inputs, outputs);
        let expected = naive_linear(size, &x, &w, &bias, before);
        for isa in Isa::available() {
            for compute in [Compute::F32, Compute::Bf16] {
                let ops = ops(compute, isa, shape.threads);
                let out = run_linear(&ops, &shape, shape.rows, &w, &x, &bias);
                // Operands are exact in all formats; only half precision rounds its sums, to
                // 11 bits each.
                let is_half = compute == Compute::Bf16 && isa == Isa::Avx512Fp16;
                let tolerance = if is_half { 2e-3 } else { 1e-6 };
                for (row, expected) in expected.chunks(outputs).enumerate() {
                    for (&ours, &(exact, magnitude)) in out.row(row).iter().zip(expected) {
                        let error = (f64::from(ours) - exact).abs();
                        prop_assert!(
                            error <= tolerance * magnitude,
                            "{isa} {compute:?} row {row}: {ours} for {exact}"
                        );
                    }
                }
                // One row alone has the same bits.
                let last = shape.rows - 1;
                let alone = run_linear(&ops, &shape, 1, &w, &x[last * shape.inputs..], &bias);
                let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                prop_assert_eq!(bits(alone.row(0)), bits(out.row(last)), "{} {:?}", isa, compute);
            }
        }
    }

    #[test]
    fn scales_keep_half_precision_in_range(bits in any::<u32>()) {
        let magnitude = f32::from_bits(bits).abs();
        let (down, up) = fp16_scales(magnitude);
        prop_assert_eq!(down * up, 1.0, "exact inverses");
        let scaled = magnitude * down;
        if magnitude.is_normal() && magnitude < f32::MAX / 4.0 && down != 1.0 {
            prop_assert!((8.0..16.0).contains(&scaled), "{magnitude} becomes {scaled}");
        }
    }

    #[test]
    fn bfloat16_rounds_like_everybody_else(bits in any::<u32>()) {
        let x = f32::from_bits(bits);
        let ours = ::half::bf16::from_bits(to_bf16(x));
        if x.is_nan() {
            prop_assert!(ours.is_nan());
        } else {
            prop_assert_eq!(ours.to_bits(), ::half::bf16::from_f32(x).to_bits());
        }
    }

    #[test]
    fn rows_are_exact(n in 1_usize..200, seed in any::<u32>()) {
        let (x, w) = (numbers(n, seed), numbers(n, seed ^ 1));
        for isa in Isa::available() {
            let kernels = Kernels::of(isa);
            let mut out = vec![0.0; n];
            // SAFETY: all have `n` numbers, and the instruction set is available.
            unsafe { (kernels.rms_norm)(n, x.as_ptr(), w.as_ptr(), 1e-5, out.as_mut_ptr()) };
            let square: f64 = x.iter().map(|&x| f64::from(x).powi(2)).sum();
            let scale = 1.0 / (square / n as f64 + 1e-5).sqrt();
            for i in 0..n {
                let exact = f64::from(x[i]) * scale * f64::from(w[i]);
                prop_assert!((f64::from(out[i]) - exact).abs() < 1e-5, "{isa} rms_norm {i}");
            }
            // SAFETY: as above.
            unsafe { (kernels.silu_mul)(n, x.as_ptr(), w.as_ptr(), out.as_mut_ptr()) };
            for i in 0..n {
                let gate = f64::from(x[i]);
                let exact = gate / (1.0 + (-gate).exp()) * f64::from(w[i]);
                prop_assert!((f64::from(out[i]) - exact).abs() < 1e-6, "{isa} silu_mul {i}");
            }
            let dim = 2 * n;
            let (head, angles) = (numbers(dim, seed ^ 3), numbers(n, seed ^ 4));
            let cosines: Vec<f32> = angles.iter().map(|x| x.cos()).collect();
            let sines: Vec<f32> = angles.iter().map(|x| x.sin()).collect();
            let mut out = vec![0.0; dim];
            // SAFETY: as above, with `2 * n` numbers in a head.
            unsafe {
                (kernels.rotate)(
                    dim, head.as_ptr(), cosines.as_ptr(), sines.as_ptr(), out.as_mut_ptr(),
                );
            }
            for i in 0..n {
                let turned = head[i] * cosines[i] - head[n + i] * sines[i];
                let other = head[n + i] * cosines[i] + head[i] * sines[i];
                prop_assert!((out[i] - turned).abs() < 1e-5, "{isa} rotate {i}");
                prop_assert!((out[n + i] - other).abs() < 1e-5, "{isa} rotate {i}");
            }
        }
    }

    #[test]
    fn attention_is_exact(
        position in 0_usize..200,
        tokens in 1_usize..40,
        group in 1_usize..5,
        half_dim in 1_usize..70,
        window in prop::option::of(1_usize..90),
        block_tokens in prop::sample::select(vec![1_usize, 3, 8, 16, 64, 100]),
        seed in any::<u32>(),
    ) {
        let dim = 2 * half_dim;
        let end = position + tokens;
        let queries = numbers(tokens * group * dim, seed);
        let (keys, values) = (numbers(end * dim, seed ^ 1), numbers(end * dim, seed ^ 2));
        let window = window.unwrap_or(usize::MAX);
        let mut expected = Vec::new();
        for row in 0..tokens * group {
            let at = position + row / group;
            let seen = (at + 1).saturating_sub(window)..at + 1;
            let query = &queries[row * dim..][..dim];
            let scores: Vec<f64> = seen.clone().map(|key| {
                let key = &keys[key * dim..][..dim];
                let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(q * k)).sum();
                dot / (dim as f64).sqrt()
            }).collect();
            let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
            let total: f64 = weights.iter().sum();
            expected.extend((0..dim).map(|d| {
                let values = seen.clone().map(|key| f64::from(values[key * dim + d]));
                weights.iter().zip(values).map(|(w, v)| w * v).sum::<f64>() / total
            }));
        }
        // Blocks in reverse order, each with its keys and then its values.
        let blocks = end.div_ceil(block_tokens);
        let mut memory = vec![f32::NAN; blocks * 2 * block_tokens * dim];
        let key_at = |at: usize| {
            ((blocks - 1 - at / block_tokens) * 2 * block_tokens + at % block_tokens) * dim
        };
        for at in 0..end {
            let key = key_at(at);
            memory[key..key + dim].copy_from_slice(&keys[at * dim..][..dim]);
            let value = key + block_tokens * dim;
            memory[value..value + dim].copy_from_slice(&values[at * dim..][..dim]);
        }
        let narrow: Vec<u16> = memory.iter().map(|&x| to_bf16(x)).collect();
        for isa in Isa::available() {
            let kernels = Kernels::of(isa);
            let case = AttendCase {
                queries: &queries, group, dim, tokens, position, window, block_tokens,
            };
            let wide = case.run(kernels.attend_f32, &memory, &key_at);
            let narrow = case.run(kernels.attend_bf16, &narrow, &key_at);
            for (i, &exact) in expected.iter().enumerate() {
                prop_assert!((f64::from(wide[i]) - exact).abs() < 1e-5, "{isa} float32 {i}");
            }
            // The operands are exact in bfloat16, so nothing may differ.
            prop_assert_eq!(&wide, &narrow, "{}", isa);
        }
    }
}

struct AttendCase<'a> {
    queries: &'a [f32],
    group: usize,
    dim: usize,
    tokens: usize,
    position: usize,
    window: usize,
    block_tokens: usize,
}

impl AttendCase<'_> {
    fn run<K: Cached>(
        &self,
        kernel: unsafe fn(&mut Attend<'_, K>),
        memory: &[K],
        key_at: &dyn Fn(usize) -> usize,
    ) -> Vec<f32> {
        let stride = self.group * self.dim;
        let mut out = vec![0.0; self.tokens * stride];
        let key_run = |at: usize| {
            let run = self.block_tokens - at % self.block_tokens;
            (memory[key_at(at)..].as_ptr(), run)
        };
        let mut attend = Attend {
            queries: self.queries.as_ptr(),
            group: self.group,
            head_dim: self.dim,
            tokens: self.tokens,
            position: self.position,
            window: self.window,
            key_run: &key_run,
            value_offset: self.block_tokens * self.dim,
            next_head: 0,
            out: out.as_mut_ptr(),
            out_stride: stride,
            scratch: &mut Scratch::default(),
        };
        // SAFETY: all rows are there, and the instruction set is available.
        unsafe { kernel(&mut attend) };
        out
    }
}

#[test]
fn embedding_reads_every_dtype() {
    let values = numbers(5 * 24, 3);
    let mut batch = Batch::default();
    batch.push(&[4, 0, 2], 0, &[], false);
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let ops = ops(Compute::F32, Isa::Portable, 1);
        let mut out = ops.matrix(3, 24).unwrap();
        ops.embed(&batch, view(&bytes(&values, dtype), dtype, 5, 24), &mut out);
        for (row, token) in [4, 0, 2].into_iter().enumerate() {
            assert_eq!(out.row(row), &values[token * 24..][..24], "{dtype:?}");
        }
    }
}

#[test]
fn softmax_survives_large_scores() {
    // Scores of +-20,000: exponentials must be taken after the maximum is subtracted.
    let dim = 64;
    let queries = vec![50.0; dim];
    let memory: Vec<f32> = [50.0, -50.0, 50.0]
        .into_iter()
        .flat_map(|key| std::iter::repeat_n(key, dim))
        .chain((0..3 * dim).map(|i| if i / dim == 1 { 1e6 } else { 2.0 }))
        .collect();
    for isa in Isa::available() {
        let case = AttendCase {
            queries: &queries,
            group: 1,
            dim,
            tokens: 1,
            position: 2,
            window: usize::MAX,
            block_tokens: 3,
        };
        let out = case.run(Kernels::of(isa).attend_f32, &memory, &|at| at * dim);
        assert_eq!(out, vec![2.0; dim], "{isa}");
    }
}

#[test]
fn half_precision_takes_outliers() {
    // One activation a million times the others, as some models have, and a tiny weight matrix.
    let shape = Shape {
        rows: 3,
        inputs: 200,
        parts: vec![64],
        dtype: DType::F32,
        threads: 1,
        add: false,
        seed: 0,
    };
    let mut x = numbers(3 * 200, 1);
    x[200 + 17] = 1e6;
    let w: Vec<f32> = numbers(64 * 200, 2).into_iter().map(|w| w * 1e-7).collect();
    let exact = naive_linear((3, 200, 64), &x, &w, &[0.0; 64], 0.0);
    for isa in Isa::available() {
        let ops = ops(Compute::Bf16, isa, 1);
        let out = run_linear(&ops, &shape, 3, &w, &x, &[0.0; 64]);
        for (at, &(exact, _)) in exact.iter().enumerate() {
            let ours = f64::from(out.row(at / 64)[at % 64]);
            // Relative to the largest term of the row.
            let scale = if at / 64 == 1 { 0.2 } else { 1e-5 };
            assert!(
                (ours - exact).abs() < 1e-2 * scale,
                "{isa} {at}: {ours} for {exact}"
            );
        }
    }
}

#[test]
fn what_is_not_finite_stays_visible() {
    // A row, or a weight, that is NaN or infinite must not come out as a plausible number.
    let shape = Shape {
        rows: 3,
        inputs: 70,
        parts: vec![64, 64],
        dtype: DType::F32,
        threads: 1,
        add: false,
        seed: 0,
    };
    let bias = [0.0; 128];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for isa in Isa::available() {
            for compute in [Compute::F32, Compute::Bf16] {
                let ops = ops(compute, isa, 1);
                let (mut x, mut w) = (numbers(3 * 70, 1), numbers(128 * 70, 2));
                x[70 + 69] = bad;
                let out = run_linear(&ops, &shape, 3, &w, &x, &bias);
                assert!(
                    out.row(0).iter().all(|y| y.is_finite()),
                    "{isa} {compute:?}"
                );
                assert!(
                    out.row(1).iter().all(|y| !y.is_finite()),
                    "{isa} {compute:?}"
                );
                x[70 + 69] = 1.0;
                w[100 * 70 + 3] = bad;
                let out = run_linear(&ops, &shape, 3, &w, &x, &bias);
                assert!(
                    (0..3).all(|row| !out.row(row)[100].is_finite()),
                    "{isa} {compute:?}"
                );
                assert!(
                    (0..3).all(|row| out.row(row)[0].is_finite()),
                    "{isa} {compute:?}"
                );
            }
        }
    }
}
