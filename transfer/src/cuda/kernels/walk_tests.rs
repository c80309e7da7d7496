//! The address arithmetic of the kernels, without a GPU: `walk.cuh` as C11, compiled by the host's
//! compiler, against plain loops. Every byte once, at the right place.

use std::process::Command;
use std::sync::OnceLock;

use libloading::Library;
use proptest::collection::vec;
use proptest::prelude::*;

use super::abi::{AXES_MAX, BpAxis, BpCopy, BpDone, BpPermute, BpSet, CALLED_OFF, CONSECUTIVE};
use super::compile::SOURCE;

/// What the tests call: whole ranges of chunks and units.
const SHIM: &str = r#"
#include "walk.cuh"
void chunks(const BpCopy *p, BpSpan *out) {
    const BpSet *sets = p->set_count == 1 ? &p->one : p->sets;
    u32 set = 0;
    for (u32 chunk = p->chunk_begin; chunk < p->chunk_end; chunk++) {
        set = bp_find_set(sets, p->set_count, set, chunk);
        *out++ = bp_chunk(sets + set, p->ids, p->chunk_bytes, chunk);
    }
}
u32 find_set(const BpSet *sets, u32 count, u32 low, u32 chunk) { return bp_find_set(sets, count, low, chunk); }
void units(const BpPermute *p, u32 step, BpPlace *out) {
    BpPlace at = bp_unit(p, p->unit_begin);
    for (u64 unit = p->unit_begin; unit < p->unit_end; unit += step) {
        *out++ = at;
        bp_advance(p, &at, step);
    }
}
u32 run_lanes(u32 vectors) { return bp_run_lanes(vectors); }
"#;

/// Every field of the structs, in both languages: a function that writes the offsets for C, and the
/// offsets for Rust.
macro_rules! layout {
    ($($of:ident { $($field:ident)* })*) => {
        fn offsets_source() -> String {
            let mut body = String::from("#include <stddef.h>\nvoid offsets(u64 *out) {\n");
            $($(body.push_str(concat!(
                "*out++ = offsetof(", stringify!($of), ", ", stringify!($field), ");\n"
            ));)*)*
            body + "*out++ = BP_CONSECUTIVE; *out++ = BP_CALLED_OFF; *out++ = BP_AXES_MAX;\n}\n"
        }
        fn offsets() -> Vec<u64> {
            let mut out = Vec::new();
            $($(out.push(std::mem::offset_of!($of, $field) as u64);)*)*
            out.extend([CONSECUTIVE.into(), CALLED_OFF.into(), AXES_MAX as u64]);
            out
        }
    };
}

layout! {
    BpSet { src dst src_block dst_block src_layer dst_layer piece_bytes src_ids dst_ids src_first dst_first blocks layers layer_major chunks_per_piece first_chunk reserved }
    BpDone { arrived flag word ticket guarded }
    BpCopy { one sets ids set_count chunk_bytes chunk_begin chunk_end done }
    BpAxis { src_stride dst_stride count reserved }
    BpPermute { src dst src_block dst_block src_ids dst_ids src_first dst_first blocks axes axis run_bytes vector_bytes ids unit_begin unit_end done }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Span {
    src: u64,
    dst: u64,
    bytes: u32,
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Place {
    src: u64,
    dst: u64,
    block: u32,
    inner: u32,
    outer: [u32; AXES_MAX - 1],
}

struct Walk {
    chunks: unsafe extern "C" fn(*const BpCopy, *mut Span),
    find_set: unsafe extern "C" fn(*const BpSet, u32, u32, u32) -> u32,
    units: unsafe extern "C" fn(*const BpPermute, u32, *mut Place),
    run_lanes: unsafe extern "C" fn(u32) -> u32,
    offsets: unsafe extern "C" fn(*mut u64),
    _library: Library,
}

fn walk() -> &'static Walk {
    static WALK: OnceLock<Walk> = OnceLock::new();
    WALK.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        for (name, body) in SOURCE.headers {
            std::fs::write(folder.path().join(name), body).unwrap();
        }
        let (source, library) = (folder.path().join("walk.c"), folder.path().join("walk.so"));
        std::fs::write(&source, format!("{SHIM}{}", offsets_source())).unwrap();
        let output = Command::new("cc")
            .args([
                "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o",
            ])
            .args([&library, &source])
            .output()
            .expect("a C compiler called cc, as for linking this test");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        // SAFETY: the library was made above and has no initialisers.
        let library = unsafe { Library::new(&library) }.unwrap();
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the type is that of the function in the source above.
                let symbol = unsafe { library.get($name) }.unwrap();
                *symbol
            }};
        }
        Walk {
            chunks: function!(b"chunks\0"),
            find_set: function!(b"find_set\0"),
            units: function!(b"units\0"),
            run_lanes: function!(b"run_lanes\0"),
            offsets: function!(b"offsets\0"),
            _library: library,
        }
    })
}

/// One side of a set: address, bytes from block to block and layer to layer, and the ids.
type SideOf = (u64, u64, u64, Result<Vec<u32>, u32>);

#[derive(Clone, Debug)]
struct SetCase {
    src: SideOf,
    dst: SideOf,
    piece: u64,
    blocks: u32,
    layers: u32,
    layer_major: bool,
}

fn sides(blocks: u32) -> impl Strategy<Value = SideOf> {
    let ids = prop_oneof![
        vec(any::<u32>(), blocks as usize).prop_map(Ok),
        (0..u32::MAX - 100).prop_map(Err),
    ];
    (0u64..1 << 47, 0u64..1 << 30, 0u64..1 << 30, ids)
}

fn sets() -> impl Strategy<Value = SetCase> {
    (0u32..7, 1u32..6, 1u64..5000, any::<bool>()).prop_flat_map(
        |(blocks, layers, piece, layer_major)| {
            (sides(blocks), sides(blocks)).prop_map(move |(src, dst)| SetCase {
                src,
                dst,
                piece,
                blocks,
                layers,
                layer_major,
            })
        },
    )
}

fn id_of(ids: &Result<Vec<u32>, u32>, block: u32) -> u64 {
    match ids {
        Ok(table) => table[block as usize].into(),
        Err(first) => (first + block).into(),
    }
}

/// Puts ids into the table and says where: the two numbers of the struct.
fn place_ids(table: &mut Vec<u32>, ids: &Result<Vec<u32>, u32>) -> (u32, u32) {
    match ids {
        Ok(list) => {
            let at = u32::try_from(table.len()).unwrap();
            table.extend(list);
            (at, 0)
        }
        Err(first) => (CONSECUTIVE, *first),
    }
}

fn address(side: &SideOf, block: u32, layer: u32) -> u64 {
    side.0
        .wrapping_add(id_of(&side.3, block).wrapping_mul(side.1))
        .wrapping_add(u64::from(layer) * side.2)
}

/// The chunks of the sets in order, by plain loops.
fn expected_chunks(cases: &[SetCase], chunk_bytes: u32) -> Vec<Span> {
    let mut out = Vec::new();
    for case in cases {
        let (outer, inner) = match case.layer_major {
            true => (case.layers, case.blocks),
            false => (case.blocks, case.layers),
        };
        for a in 0..outer {
            for b in 0..inner {
                let (block, layer) = if case.layer_major { (b, a) } else { (a, b) };
                let mut offset = 0;
                while offset < case.piece {
                    let bytes = (case.piece - offset).min(chunk_bytes.into());
                    out.push(Span {
                        src: address(&case.src, block, layer).wrapping_add(offset),
                        dst: address(&case.dst, block, layer).wrapping_add(offset),
                        bytes: u32::try_from(bytes).unwrap(),
                    });
                    offset += bytes;
                }
            }
        }
    }
    out
}

fn to_sets(cases: &[SetCase], chunk_bytes: u32) -> (Vec<BpSet>, Vec<u32>) {
    let (mut ids, mut first_chunk) = (Vec::new(), 0);
    let sets = cases.iter().map(|case| {
        let (src_ids, src_first) = place_ids(&mut ids, &case.src.3);
        let (dst_ids, dst_first) = place_ids(&mut ids, &case.dst.3);
        let chunks_per_piece = u32::try_from(case.piece.div_ceil(u64::from(chunk_bytes))).unwrap();
        let set = BpSet {
            src: case.src.0,
            dst: case.dst.0,
            src_block: case.src.1,
            dst_block: case.dst.1,
            src_layer: case.src.2,
            dst_layer: case.dst.2,
            piece_bytes: case.piece,
            src_ids,
            dst_ids,
            src_first,
            dst_first,
            blocks: case.blocks,
            layers: case.layers,
            layer_major: case.layer_major.into(),
            chunks_per_piece,
            first_chunk,
            reserved: 0,
        };
        first_chunk += chunks_per_piece * case.blocks * case.layers;
        set
    });
    (sets.collect(), ids)
}

#[derive(Clone, Debug)]
struct PermuteCase {
    src: SideOf,
    dst: SideOf,
    blocks: u32,
    axes: Vec<(u64, u64, u32)>,
}

fn permutes() -> impl Strategy<Value = PermuteCase> {
    (1u32..5).prop_flat_map(|blocks| {
        let axes = vec((0u64..1 << 30, 0u64..1 << 30, 1u32..6), 1..=AXES_MAX);
        (sides(blocks), sides(blocks), axes).prop_map(move |(src, dst, axes)| PermuteCase {
            src,
            dst,
            blocks,
            axes,
        })
    })
}

/// Addresses of the units in order, by plain loops.
fn expected_units(case: &PermuteCase) -> Vec<(u64, u64)> {
    let mut out = Vec::new();
    for block in 0..case.blocks {
        let mut places = vec![(address(&case.src, block, 0), address(&case.dst, block, 0))];
        for (src_stride, dst_stride, count) in &case.axes {
            let mut next = Vec::new();
            for (src, dst) in places {
                for index in 0..u64::from(*count) {
                    next.push((
                        src.wrapping_add(index * src_stride),
                        dst.wrapping_add(index * dst_stride),
                    ));
                }
            }
            places = next;
        }
        out.extend(places);
    }
    out
}

proptest! {
    #[test]
    fn every_chunk_is_where_plain_loops_put_it(
        cases in vec(sets(), 1..6),
        chunk_bytes in 1u32..3000,
        cut in any::<prop::sample::Index>(),
    ) {
        let expected = expected_chunks(&cases, chunk_bytes);
        let (sets, ids) = to_sets(&cases, chunk_bytes);
        let mut copy = BpCopy {
            one: sets[0],
            sets: sets.as_ptr() as u64,
            ids: ids.as_ptr() as u64,
            set_count: u32::try_from(sets.len()).unwrap(),
            chunk_bytes,
            ..BpCopy::default()
        };
        // In two launches, as an operation can be.
        let total = expected.len();
        let middle = cut.index(total + 1);
        let mut found = Vec::new();
        for (begin, end) in [(0, middle), (middle, total)] {
            copy.chunk_begin = u32::try_from(begin).unwrap();
            copy.chunk_end = u32::try_from(end).unwrap();
            let mut part = vec![Span::default(); end - begin];
            // SAFETY: the tables outlive the call, and there is room for one span per chunk.
            unsafe { (walk().chunks)(&raw const copy, part.as_mut_ptr()) };
            found.extend(part);
        }
        prop_assert_eq!(&found, &expected);
        // The same from any set at or before the right one.
        for chunk in (0..total).step_by(1 + total / 20) {
            let chunk = u32::try_from(chunk).unwrap();
            let right = sets.iter().rposition(|set| set.first_chunk <= chunk).unwrap();
            for low in 0..=u32::try_from(right).unwrap() {
                // SAFETY: the table has as many sets as it is said to have.
                let set = unsafe { (walk().find_set)(sets.as_ptr(), copy.set_count, low, chunk) };
                prop_assert_eq!(set as usize, right);
            }
        }
    }

    #[test]
    fn every_unit_is_where_plain_loops_put_it(
        case in permutes(),
        begin in any::<prop::sample::Index>(),
        step in 1u32..70,
    ) {
        let expected = expected_units(&case);
        let mut ids = Vec::new();
        let (src_ids, src_first) = place_ids(&mut ids, &case.src.3);
        let (dst_ids, dst_first) = place_ids(&mut ids, &case.dst.3);
        let mut axis = [BpAxis::default(); AXES_MAX];
        for (to, (src_stride, dst_stride, count)) in axis.iter_mut().zip(&case.axes) {
            (to.src_stride, to.dst_stride, to.count) = (*src_stride, *dst_stride, *count);
        }
        let begin = begin.index(expected.len());
        let permute = BpPermute {
            src: case.src.0,
            dst: case.dst.0,
            src_block: case.src.1,
            dst_block: case.dst.1,
            src_ids,
            dst_ids,
            src_first,
            dst_first,
            blocks: case.blocks,
            axes: u32::try_from(case.axes.len()).unwrap(),
            axis,
            ids: ids.as_ptr() as u64,
            unit_begin: begin as u64,
            unit_end: expected.len() as u64,
            ..BpPermute::default()
        };
        let mut places = vec![Place::default(); (expected.len() - begin).div_ceil(step as usize)];
        // SAFETY: the id table outlives the call, and there is room for one place per step.
        unsafe { (walk().units)(&raw const permute, step, places.as_mut_ptr()) };
        let found: Vec<_> = places.iter().map(|place| (place.src, place.dst)).collect();
        let wanted: Vec<_> = expected[begin..].iter().copied().step_by(step as usize).collect();
        prop_assert_eq!(found, wanted);
    }
}

#[test]
fn lanes_of_a_run_split_no_line_and_leave_no_vector() {
    for vectors in 1..5000 {
        // SAFETY: the function takes any number.
        let lanes = unsafe { (walk().run_lanes)(vectors) };
        assert!(
            (1..=32).contains(&lanes) && lanes <= vectors,
            "{vectors}: {lanes}"
        );
        if vectors % 8 == 0 {
            assert!(vectors % lanes == 0 && lanes % 8 == 0, "{vectors}: {lanes}");
        }
    }
}

#[test]
fn both_languages_have_the_fields_at_the_same_places() {
    let expected = offsets();
    let mut found = vec![0; expected.len()];
    // SAFETY: the function writes one number per field and constant, as many as were counted here.
    unsafe { (walk().offsets)(found.as_mut_ptr()) };
    assert_eq!(found, expected);
}
