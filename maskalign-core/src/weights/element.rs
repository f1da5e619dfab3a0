//! The number formats of weights files, decoded to `f32`.

use half::{bf16, f16};

/// The number formats that files hold; all become `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    Bf16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

impl Element {
    /// Bytes of one number.
    pub(super) fn size(self) -> usize {
        match self {
            Element::F64 | Element::I64 | Element::U64 => 8,
            Element::F32 | Element::I32 | Element::U32 => 4,
            Element::F16 | Element::Bf16 | Element::I16 | Element::U16 => 2,
            Element::I8 | Element::U8 | Element::Bool => 1,
        }
    }

    /// Appends the little-endian numbers in `bytes`, whole numbers only, to `out`.
    pub(super) fn decode(self, bytes: &[u8], out: &mut Vec<f32>) {
        fn each<const N: usize>(bytes: &[u8], out: &mut Vec<f32>, convert: impl Fn([u8; N]) -> f32) {
            out.extend(bytes.as_chunks::<N>().0.iter().map(|number| convert(*number)));
        }
        match self {
            Element::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
            Element::F32 => each(bytes, out, f32::from_le_bytes),
            Element::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
            Element::Bf16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
            Element::I64 => each(bytes, out, |b| i64::from_le_bytes(b) as f32),
            Element::I32 => each(bytes, out, |b| i32::from_le_bytes(b) as f32),
            Element::I16 => each(bytes, out, |b| f32::from(i16::from_le_bytes(b))),
            Element::I8 => each(bytes, out, |b| f32::from(i8::from_le_bytes(b))),
            Element::U64 => each(bytes, out, |b| u64::from_le_bytes(b) as f32),
            Element::U32 => each(bytes, out, |b| u32::from_le_bytes(b) as f32),
            Element::U16 => each(bytes, out, |b| f32::from(u16::from_le_bytes(b))),
            Element::U8 => each(bytes, out, |[b]| f32::from(b)),
            Element::Bool => each(bytes, out, |[b]| f32::from(u8::from(b != 0))),
        }
    }
}

/// More elements than any tensor has, and few enough that a small multiple of them is a number still.
const MAX_ELEMENTS: usize = 1 << 48;

/// The product of a shape; `None` where it is absurd. A side of 0 makes no other side less absurd: what is planned from a
/// shape multiplies its sides one by one.
pub(super) fn element_count(shape: &[usize]) -> Option<usize> {
    let product =
        |product: usize, &length: &usize| product.checked_mul(length.max(1)).filter(|product| *product <= MAX_ELEMENTS);
    let count = shape.iter().try_fold(1usize, product)?;
    Some(if shape.contains(&0) { 0 } else { count })
}
