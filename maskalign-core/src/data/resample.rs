//! Antialiased resampling of 8-bit images with Pillow's arithmetic: the same bytes for the same input.
//!
//! Source of the law: Pillow's `Image.resize` (its `Resample.c`). Two passes, one over columns and one over lines,
//! each rounding to 8 bits; weights in f64, normalised to sum 1, then rounded to multiples of 2^-22.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::image::{Crop, RgbImage};

/// How pixels are mixed when an image is resized.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum Interpolation {
    /// Cubic convolution with a = -0.5, widened when shrinking (Pillow's `BICUBIC`).
    #[default]
    Bicubic,
    /// The triangle filter, widened when shrinking (Pillow's `BILINEAR`).
    Bilinear,
}

impl Interpolation {
    /// Half the filter's width, in pixels of the smaller of both images.
    fn support(self) -> f64 {
        match self {
            Interpolation::Bicubic => 2.0,
            Interpolation::Bilinear => 1.0,
        }
    }

    fn weight(self, distance: f64) -> f64 {
        const A: f64 = -0.5;
        let x = distance.abs();
        match self {
            Interpolation::Bicubic if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            Interpolation::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
            Interpolation::Bilinear if x < 1.0 => 1.0 - x,
            _ => 0.0,
        }
    }
}

/// Cuts `crop` out of `image` and resizes it to `width` x `height`: what Pillow gives for `crop` and then `resize`.
///
/// `crop` lies inside the image and neither it nor the new size is empty.
pub fn resize(image: &RgbImage, crop: Crop, width: usize, height: usize, interpolation: Interpolation) -> RgbImage {
    debug_assert!(crop.left + crop.width <= image.width && crop.top + crop.height <= image.height);
    let first = (crop.top * image.width + crop.left) * 3;
    let rows = Rows { values: &image.pixels[first..], stride: image.width * 3 };
    RgbImage { width, height, pixels: passes(rows, crop, width, height, interpolation) }
}

maskalign_engine::simd_fn! {
    /// The work on one image, with the same arithmetic on every instruction set.
    fn passes(rows: Rows<'_>, crop: Crop, width: usize, height: usize, interpolation: Interpolation) -> Vec<u8>
        = passes_body;
}

// Inlined, as is all below it, so that it is compiled once for each instruction set.
#[inline(always)]
fn passes_body<const FMA: bool>(
    rows: Rows<'_>,
    crop: Crop,
    width: usize,
    height: usize,
    interpolation: Interpolation,
) -> Vec<u8> {
    let columns = || Weights::new(crop.width, width, interpolation);
    let lines = || Weights::new(crop.height, height, interpolation);
    match (width == crop.width, height == crop.height) {
        (true, true) => (0..height).flat_map(|row| rows.row(row, width * 3)).copied().collect(),
        (false, true) => mix_columns(rows, crop, &columns()),
        (true, false) => mix_lines(rows, width * 3, &lines()),
        (false, false) if lines_first(crop, width, height) => {
            let lowered = mix_lines(rows, crop.width * 3, &lines());
            let rows = Rows { values: &lowered, stride: crop.width * 3 };
            mix_columns(rows, Crop { height, ..crop }, &columns())
        }
        (false, false) => {
            let narrowed = mix_columns(rows, crop, &columns());
            mix_lines(Rows { values: &narrowed, stride: width * 3 }, width * 3, &lines())
        }
    }
}

/// Whether Pillow mixes lines before columns: since version 13 it does where the height shrinks by more than twice what
/// the width does, both in pixels; before, never. The order shows in the last bits, and more where a sum is clipped.
fn lines_first(crop: Crop, width: usize, height: usize) -> bool {
    height < crop.height && crop.height + 2 * width > height + 2 * crop.width
}

const PRECISION_BITS: u32 = 32 - 8 - 2;
const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// For each output pixel, which input pixels it mixes and by how much.
struct Weights {
    /// First input pixel and the range of its weights in `values`.
    spans: Vec<(usize, std::ops::Range<usize>)>,
    /// Multiples of 2^-22.
    values: Vec<i32>,
}

impl Weights {
    fn new(input: usize, output: usize, interpolation: Interpolation) -> Self {
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = interpolation.support() * filter_scale;
        let narrowing = 1.0 / filter_scale;
        let mut spans = Vec::with_capacity(output);
        let mut values = Vec::new();
        let mut exact = Vec::new();
        for out in 0..output {
            let center = (out as f64 + 0.5) * scale;
            // The casts cut towards zero, and to zero what is negative.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            exact.clear();
            exact.extend((first..end).map(|x| interpolation.weight((x as f64 - center + 0.5) * narrowing)));
            let sum: f64 = exact.iter().sum();
            let start = values.len();
            values.extend(exact.iter().map(|&weight| {
                let fixed = if sum == 0.0 { weight } else { weight / sum } * f64::from(1 << PRECISION_BITS);
                (if fixed < 0.0 { fixed - 0.5 } else { fixed + 0.5 }) as i32
            }));
            spans.push((first, start..values.len()));
        }
        Self { spans, values }
    }
}

/// Rows of 8-bit values inside a larger image, which begins with the first value used.
#[derive(Clone, Copy)]
struct Rows<'a> {
    values: &'a [u8],
    /// Values from one row to the next.
    stride: usize,
}

impl<'a> Rows<'a> {
    #[inline(always)]
    fn row(self, row: usize, length: usize) -> &'a [u8] {
        &self.values[row * self.stride..][..length]
    }
}

#[inline(always)]
fn to_u8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Rows worked on at once: neighbouring lanes hold neighbouring rows, which share their weights.
const BLOCK: usize = 16;

/// One column of a block of rows: `BLOCK` values of red, then of green, then of blue.
type Column = [u8; 3 * BLOCK];

/// Mixes the columns of the rows of a box; gives the narrower or wider rows.
#[inline(always)]
fn mix_columns(rows: Rows<'_>, crop: Crop, weights: &Weights) -> Vec<u8> {
    let (length, new_length) = (crop.width * 3, weights.spans.len() * 3);
    let mut out = vec![0; crop.height * new_length];
    let mut block: Vec<Column> = vec![[0; 3 * BLOCK]; crop.width];
    let mut mixed: Vec<Column> = vec![[0; 3 * BLOCK]; weights.spans.len()];
    for (index, out) in out.chunks_mut(BLOCK * new_length).enumerate() {
        let first = index * BLOCK;
        for lane in 0..out.len() / new_length {
            let (pixels, _) = rows.row(first + lane, length).as_chunks::<3>();
            for (column, pixel) in block.iter_mut().zip(pixels) {
                column[lane] = pixel[0];
                column[BLOCK + lane] = pixel[1];
                column[2 * BLOCK + lane] = pixel[2];
            }
        }
        for ((first, span), mixed) in weights.spans.iter().zip(&mut mixed) {
            mix_lanes(&block[*first..], &weights.values[span.clone()], mixed);
        }
        for (lane, row) in out.chunks_exact_mut(new_length).enumerate() {
            let (pixels, _) = row.as_chunks_mut::<3>();
            for (pixel, column) in pixels.iter_mut().zip(&mixed) {
                *pixel = [column[lane], column[BLOCK + lane], column[2 * BLOCK + lane]];
            }
        }
    }
    out
}

/// Mixes rows of `length` values; gives the fewer or more rows.
#[inline(always)]
fn mix_lines(rows: Rows<'_>, length: usize, weights: &Weights) -> Vec<u8> {
    const LANES: usize = 32;
    let mut out = vec![0; weights.spans.len() * length];
    for ((first, span), out) in weights.spans.iter().zip(out.chunks_exact_mut(length)) {
        let values = &weights.values[span.clone()];
        let lines = |column: usize| rows.values[first * rows.stride + column..].chunks(rows.stride);
        if length < LANES {
            for (column, out) in out.iter_mut().enumerate() {
                let mut mixed = [0];
                mix_lanes(lines(column).filter_map(|line| line.first_chunk()), values, &mut mixed);
                [*out] = mixed;
            }
            continue;
        }
        for column in (0..length).step_by(LANES) {
            // The last lanes may do some of the work a second time, rather than end early.
            let column = column.min(length - LANES);
            if let Some(out) = out[column..].first_chunk_mut::<LANES>() {
                mix_lanes(lines(column).filter_map(|line| line.first_chunk()), values, out);
            }
        }
    }
    out
}

/// The sum of the inputs times their weights, lane by lane.
// Plain loops over lanes and nothing passed as a closure: what the compiler is sure to vectorise.
#[inline(always)]
fn mix_lanes<'a, const LANES: usize>(
    inputs: impl IntoIterator<Item = &'a [u8; LANES]>,
    weights: &[i32],
    mixed: &mut [u8; LANES],
) {
    let mut sums = [HALF; LANES];
    for (values, &weight) in inputs.into_iter().zip(weights) {
        for lane in 0..LANES {
            sums[lane] += i32::from(values[lane]) * weight;
        }
    }
    for lane in 0..LANES {
        mixed[lane] = to_u8(sums[lane]);
    }
}
