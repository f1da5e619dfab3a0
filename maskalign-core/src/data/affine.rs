//! Turned and sheared images in Pillow's arithmetic: the same bytes.
//!
//! Source of the law: Pillow's `Image.rotate` and `Image.transform`, and its `Geometry.c`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::image::RgbImage;

/// How the value between pixels is found where an image is turned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Sampling {
    /// That of the nearest pixel.
    #[default]
    Nearest,
    /// Linear between the nearest four.
    Bilinear,
    /// By cubic convolution with a = -1 of the nearest sixteen.
    Bicubic,
}

/// How large a turned image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Canvas {
    /// As large as before: corners are cut off.
    Kept,
    /// As large as it has to be to hold all of it.
    Expanded,
}

/// What a point of the result is in the image: `(a x + b y + c, d x + e y + f)`.
pub(crate) type Matrix = [f64; 6];

/// Turns an image about its middle, counter-clockwise; `fill` comes in from outside.
pub(crate) fn rotate(image: RgbImage, degrees: f64, sampling: Sampling, canvas: Canvas, fill: [u8; 3]) -> RgbImage {
    let degrees = degrees.rem_euclid(360.0);
    if degrees == 0.0 {
        return image;
    }
    // Pillow does not look between pixels here; the general way would, where only one of the sides is odd.
    if (degrees == 90.0 || degrees == 270.0) && (canvas == Canvas::Expanded || image.width == image.height) {
        return quarter(&image, degrees);
    }
    let angle = -degrees.to_radians();
    let (cos, sin) = (rounded(angle.cos()), rounded(angle.sin()));
    let (width, height) = (image.width as f64, image.height as f64);
    let (x, y) = (width / 2.0, height / 2.0);
    let mut matrix = [cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y];
    let size = match canvas {
        Canvas::Kept => image.size(),
        Canvas::Expanded => {
            let corners = [(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)].map(|point| at(matrix, point));
            let extent = |along: [f64; 4]| {
                let least = along.into_iter().fold(f64::INFINITY, f64::min);
                let most = along.into_iter().fold(f64::NEG_INFINITY, f64::max);
                most.ceil() - least.floor()
            };
            let (wide, high) = (extent(corners.map(|(x, _)| x)), extent(corners.map(|(_, y)| y)));
            (matrix[2], matrix[5]) = at(matrix, (-(wide - width) / 2.0, -(high - height) / 2.0));
            (wide as usize, high as usize)
        }
    };
    affine(&image, size, matrix, sampling, fill)
}

/// A quarter of a turn: counter-clockwise by 90 degrees, clockwise by 270.
fn quarter(image: &RgbImage, degrees: f64) -> RgbImage {
    let (width, height) = (image.height, image.width);
    let mut pixels = Vec::with_capacity(image.pixels.len());
    for y in 0..height {
        for x in 0..width {
            let (column, row) = if degrees == 90.0 { (image.width - 1 - y, x) } else { (y, image.height - 1 - x) };
            pixels.extend(pixel(image, column, row));
        }
    }
    RgbImage { width, height, pixels }
}

/// To fifteen decimals, as Pillow does it, so that right angles are exact.
fn rounded(value: f64) -> f64 {
    // The decimal text is exact; 1e15 times the value is not.
    format!("{value:.15}").parse().unwrap_or(value)
}

fn at([a, b, c, d, e, f]: Matrix, (x, y): (f64, f64)) -> (f64, f64) {
    (a * x + b * y + c, d * x + e * y + f)
}

/// An image of `(width, height)` pixels, each from where `matrix` takes its middle; `fill` from outside.
pub(crate) fn affine(
    image: &RgbImage,
    (width, height): (usize, usize),
    matrix: Matrix,
    sampling: Sampling,
    fill: [u8; 3],
) -> RgbImage {
    let between = match sampling {
        Sampling::Nearest => return nearest(image, (width, height), matrix, fill),
        Sampling::Bilinear => bilinear,
        Sampling::Bicubic => bicubic,
    };
    let (columns, rows) = (image.width as f64, image.height as f64);
    let mut pixels = Vec::with_capacity(3 * width * height);
    for y in 0..height {
        for x in 0..width {
            let (x, y) = at(matrix, (x as f64 + 0.5, y as f64 + 0.5));
            let inside = (0.0..columns).contains(&x) && (0.0..rows).contains(&y);
            pixels.extend(if inside { between(image, x - 0.5, y - 0.5) } else { fill });
        }
    }
    RgbImage { width, height, pixels }
}

/// The nearest pixels, with positions in fixed point of 16 bits. (Beyond 32,768 pixels Pillow goes over to floating point;
/// this does not.)
fn nearest(image: &RgbImage, (width, height): (usize, usize), matrix: Matrix, fill: [u8; 3]) -> RgbImage {
    let [a, b, c, d, e, f] = matrix;
    let fixed = |value: f64| (value * 65536.0 + 0.5).floor() as i64;
    let first = [fixed(c + a * 0.5 + b * 0.5), fixed(f + d * 0.5 + e * 0.5)];
    let [a, b, d, e] = [a, b, d, e].map(fixed);
    let mut pixels = Vec::with_capacity(3 * width * height);
    for y in 0..height as i64 {
        for x in 0..width as i64 {
            let column = usize::try_from((first[0] + a * x + b * y) >> 16);
            let row = usize::try_from((first[1] + d * x + e * y) >> 16);
            pixels.extend(match (column, row) {
                (Ok(x), Ok(y)) if x < image.width && y < image.height => pixel(image, x, y),
                _ => fill,
            });
        }
    }
    RgbImage { width, height, pixels }
}

fn pixel(image: &RgbImage, x: usize, y: usize) -> [u8; 3] {
    std::array::from_fn(|channel| value(image, x, y, channel))
}

fn value(image: &RgbImage, x: usize, y: usize, channel: usize) -> u8 {
    image.pixels[(y * image.width + x) * 3 + channel]
}

/// The value on the lines between pixels; rows beyond the edge repeat what was before them.
fn bilinear(image: &RgbImage, x: f64, y: f64) -> [u8; 3] {
    let (left, top) = (x.floor(), y.floor());
    let (dx, dy) = (x - left, y - top);
    let inside = |at: f64, count: usize| at.clamp(0.0, count as f64 - 1.0) as usize;
    let (first, second) = (inside(left, image.width), inside(left + 1.0, image.width));
    std::array::from_fn(|channel| {
        let row = |y: f64| {
            let y = inside(y, image.height);
            let (first, second) = (value(image, first, y, channel), value(image, second, y, channel));
            f64::from(first) + f64::from(i16::from(second) - i16::from(first)) * dx
        };
        let (above, below) = (row(top), row(top + 1.0));
        (above + (below - above) * dy) as u8
    })
}

/// The value between pixels, by cubic convolution; rows beyond the edge repeat what was before them.
fn bicubic(image: &RgbImage, x: f64, y: f64) -> [u8; 3] {
    let (width, height) = image.size();
    let (left, top) = (x.floor(), y.floor());
    let (dx, dy) = (x - left, y - top);
    let columns: [usize; 4] =
        std::array::from_fn(|i| (left as isize - 1 + i as isize).clamp(0, width as isize - 1) as usize);
    let row = |y: usize, channel: usize| cubic(columns.map(|x| f64::from(value(image, x, y, channel))), dx);
    std::array::from_fn(|channel| {
        let first = (top as isize - 1).clamp(0, height as isize - 1) as usize;
        let mut rows = [row(first, channel); 4];
        for i in 1..4 {
            let y = top as isize - 1 + i as isize;
            rows[i] = if (0..height as isize).contains(&y) { row(y as usize, channel) } else { rows[i - 1] };
        }
        cubic(rows, dy) as u8
    })
}

/// The cubic through four equidistant values, `d` of the way from the second to the third.
fn cubic([v1, v2, v3, v4]: [f64; 4], d: f64) -> f64 {
    let linear = v3 - v1;
    let square = 2.0 * (v1 - v2) + v3 - v4;
    // In Pillow's order, which shows where a position is all but that of a pixel.
    let cube = v2 - v1 - v3 + v4;
    v2 + d * (linear + d * (square + d * cube))
}
