//! Gaussian blur in two forms: Pillow's, by boxes, and torchvision's, by a kernel.

use super::image::{RgbImage, reflected};

/// Boxes that stand for a Gaussian, one after the other.
const PASSES: usize = 3;

/// Pillow's `ImageFilter.GaussianBlur(sigma)`, to the byte: three boxes whose radius has a fraction, along rows and then
/// along columns, each rounding to 8 bits; pixels beyond the edge repeat the last.
///
/// Source: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering", as Pillow's
/// `BoxBlur.c` computes it, in single precision and in fixed point of 24 bits.
pub(crate) fn by_boxes(image: RgbImage, sigma: f64) -> RgbImage {
    let radius = box_radius(sigma as f32);
    if radius <= 0.0 {
        return image;
    }
    let extended = ExtendedBox::new(radius);
    let RgbImage { width, height, mut pixels } = image;
    let mut blurred = vec![0; pixels.len()];
    for _ in 0..PASSES {
        extended.rows(&pixels, width, &mut blurred);
        std::mem::swap(&mut pixels, &mut blurred);
    }
    for _ in 0..PASSES {
        extended.columns(&pixels, width, &mut blurred);
        std::mem::swap(&mut pixels, &mut blurred);
    }
    RgbImage { width, height, pixels }
}

/// The radius of the box whose [`PASSES`] passes have the variance `sigma`^2.
fn box_radius(sigma: f32) -> f32 {
    let variance = sigma * sigma / PASSES as f32;
    let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
    let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
    let fraction = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
    whole + fraction
}

/// A box whose two outermost pixels count in part.
struct ExtendedBox {
    /// Pixels on each side that count in full.
    radius: usize,
    /// Weight of these, in parts of 2^24.
    full: u32,
    /// Weight of the two beyond them.
    part: u32,
}

impl ExtendedBox {
    fn new(radius: f32) -> Self {
        const ONE: u32 = 1 << 24;
        let whole = radius as u32;
        let full = (ONE as f32 / (radius * 2.0 + 1.0)) as u32;
        Self { radius: whole as usize, full, part: ONE.wrapping_sub((2 * whole + 1).wrapping_mul(full)) / 2 }
    }

    /// The mean of a box, given the sum of its full pixels and that of its two partial ones.
    fn mean(&self, inner: u32, outer: u32) -> u8 {
        let sum = inner.wrapping_mul(self.full).wrapping_add(outer.wrapping_mul(self.part));
        (sum.wrapping_add(1 << 23) >> 24) as u8
    }

    /// Rows of `width` pixels from `from` into `to`.
    fn rows(&self, from: &[u8], width: usize, to: &mut [u8]) {
        let margin = self.radius + 1;
        // A row with its ends repeated beyond them: the box of pixel x is x ..= x + 2 margin, its ends partial.
        let mut extended = vec![[0; 3]; width + 2 * margin];
        for (from, to) in from.chunks_exact(3 * width).zip(to.chunks_exact_mut(3 * width)) {
            let ((from, _), (to, _)) = (from.as_chunks::<3>(), to.as_chunks_mut::<3>());
            extended[..margin].fill(from[0]);
            extended[margin..margin + width].copy_from_slice(from);
            extended[margin + width..].fill(from[width - 1]);
            let mut inner = [0; 3];
            for pixel in &extended[1..2 * margin] {
                add(&mut inner, *pixel);
            }
            for (x, to) in to.iter_mut().enumerate() {
                let (left, right) = (extended[x], extended[x + 2 * margin]);
                *to = std::array::from_fn(|c| self.mean(inner[c], u32::from(left[c]) + u32::from(right[c])));
                add(&mut inner, right);
                subtract(&mut inner, extended[x + 1]);
            }
        }
    }

    /// Columns of an image of `width` pixels a row from `from` into `to`, all of them side by side.
    fn columns(&self, from: &[u8], width: usize, to: &mut [u8]) {
        let stride = 3 * width;
        let margin = self.radius as isize + 1;
        let last = (from.len() / stride) as isize - 1;
        let row = |y: isize| &from[y.clamp(0, last) as usize * stride..][..stride];
        let mut inner = vec![0u32; stride];
        for y in 1 - margin..margin {
            inner.iter_mut().zip(row(y)).for_each(|(sum, value)| *sum += u32::from(*value));
        }
        for (y, to) in to.chunks_exact_mut(stride).enumerate() {
            let y = y as isize;
            let (above, below, leaving) = (row(y - margin), row(y + margin), row(y + 1 - margin));
            for i in 0..stride {
                to[i] = self.mean(inner[i], u32::from(above[i]) + u32::from(below[i]));
                inner[i] = inner[i] + u32::from(below[i]) - u32::from(leaving[i]);
            }
        }
    }
}

fn add(sums: &mut [u32; 3], pixel: [u8; 3]) {
    sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum += u32::from(value));
}

fn subtract(sums: &mut [u32; 3], pixel: [u8; 3]) {
    sums.iter_mut().zip(pixel).for_each(|(sum, value)| *sum -= u32::from(value));
}

/// torchvision's `GaussianBlur(kernel_size, sigma)`: a kernel of `side` x `side` pixels, the image reflected beyond its
/// edges, in single precision, rounded to the nearest level.
///
/// torchvision leaves the order of its sums to PyTorch, which chooses it by size, processor and number of threads: a value
/// that lies within its rounding error of the middle of two levels may come out as either. Where the image is too small to
/// be reflected once, torchvision refuses it; here it is reflected as often as needed.
pub(crate) fn by_kernel(image: &RgbImage, sigma: f64, side: usize) -> RgbImage {
    let (width, height) = image.size();
    let (stride, half) = (3 * width, (side / 2) as isize);
    let weights = kernel(sigma, side);
    // Along rows, which stay as numbers, and then along columns.
    let mut rows = vec![0.0f32; image.pixels.len()];
    let mut extended = vec![0.0f32; stride + 3 * (side - 1)];
    for (from, to) in image.pixels.chunks_exact(stride).zip(rows.chunks_exact_mut(stride)) {
        for (x, pixel) in extended.chunks_exact_mut(3).enumerate() {
            let source = 3 * reflected(x as isize - half, width);
            pixel.iter_mut().zip(&from[source..source + 3]).for_each(|(to, from)| *to = f32::from(*from));
        }
        for (k, &weight) in weights.iter().enumerate() {
            to.iter_mut().zip(&extended[3 * k..]).for_each(|(sum, value)| *sum += weight * value);
        }
    }
    let mut sums = vec![0.0f32; stride];
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for y in 0..height {
        sums.fill(0.0);
        for (k, &weight) in weights.iter().enumerate() {
            let source = reflected(y as isize + k as isize - half, height);
            let row = &rows[source * stride..][..stride];
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += weight * value);
        }
        pixels.extend(sums.iter().map(|sum| sum.round_ties_even() as u8));
    }
    RgbImage { width, height, pixels }
}

/// Values of the normal density at whole distances from the middle, of sum 1.
fn kernel(sigma: f64, side: usize) -> Vec<f32> {
    let half = (side / 2) as f64;
    let density = |k: usize| (-0.5 * ((k as f64 - half) / sigma).powi(2)).exp();
    let sum: f64 = (0..side).map(density).sum();
    (0..side).map(|k| (density(k) / sum) as f32).collect()
}
