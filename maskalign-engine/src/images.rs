//! A batch of images on its way into the towers.

use maskalign_kernels::{Pool, elementwise as ew, for_parts};

use crate::context::Context;

pub use maskalign_kernels::elementwise::Patches;

/// Square RGB images in [0, 1], `[batch, 3, size, size]` row-major, on the host: each tower resizes and normalises for
/// itself.
///
/// ```
/// # use maskalign_engine::ImageBatch;
/// let grey = ImageBatch { pixels: vec![0.5; 2 * 3 * 8 * 8], batch: 2, size: 8 };
/// assert_eq!(grey.pixels.len(), grey.batch * 3 * grey.size * grey.size);
/// ```
#[derive(Clone, Debug)]
pub struct ImageBatch {
    /// The values.
    pub pixels: Vec<f32>,
    /// Images.
    pub batch: usize,
    /// Side in pixels.
    pub size: usize,
}

/// For each output position, four input positions and their weights.
struct Taps(Vec<[(usize, f32); 4]>);

impl Taps {
    fn new(from: usize, to: usize) -> Taps {
        let scale = from as f32 / to as f32;
        let taps = |output: usize| {
            let centre = scale * (output as f32 + 0.5) - 0.5;
            let first = centre.floor();
            let weights = cubic_weights(centre - first);
            std::array::from_fn(|i| {
                let position = first as isize - 1 + i as isize;
                (position.clamp(0, from as isize - 1) as usize, weights[i])
            })
        };
        Taps((0..to).map(taps).collect())
    }
}

/// Weights of the samples at -1, 0, 1 and 2 for a point at `t` in 0..1 (Keys' kernel).
fn cubic_weights(t: f32) -> [f32; 4] {
    const A: f32 = -0.75;
    let near = |x: f32| ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0;
    let far = |x: f32| ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A;
    let rest = 1.0 - t;
    [far(t + 1.0), near(t), near(rest), far(rest + 1.0)]
}

/// Resizes a batch of float images `[B,C,H,W]` to `[B,C,to[0],to[1]]`, one plane for each task: PyTorch's
/// `F.interpolate(mode="bicubic", align_corners=False)`, with a = -0.75, half-pixel centres, the border replicated, no
/// antialiasing, all in `f32`.
///
/// Each side of the input must be at least one. If the sizes are equal, the values are returned unchanged.
///
/// # Panics
/// If `data` is not as long as the product of `shape`.
pub fn resize_images_bicubic(pool: &Pool, data: &[f32], shape: [usize; 4], to: [usize; 2]) -> Vec<f32> {
    let [batch, channels, height, width] = shape;
    assert_eq!(data.len(), shape.iter().product::<usize>(), "data and shape disagree");
    if [height, width] == to {
        return data.to_vec();
    }
    let [to_height, to_width] = to;
    let (columns, rows) = (Taps::new(width, to_width), Taps::new(height, to_height));
    let mut out = vec![0.0; batch * channels * to_height * to_width];
    for_parts(pool, &mut out, to_height * to_width, |start, out| {
        let from = start / (to_height * to_width) * height * width;
        let mut wide = vec![0.0; height * to_width];
        for (line, resized) in data[from..].chunks_exact(width).zip(wide.chunks_exact_mut(to_width)) {
            for (value, taps) in resized.iter_mut().zip(&columns.0) {
                let [a, b, c, d] = taps.map(|(x, weight)| line[x] * weight);
                *value = a + b + c + d;
            }
        }
        for (row, taps) in out.chunks_exact_mut(to_width).zip(&rows.0) {
            let [a, b, c, d] = taps.map(|(y, _)| &wide[y * to_width..][..row.len()]);
            let [wa, wb, wc, wd] = taps.map(|(_, weight)| weight);
            for x in 0..row.len() {
                row[x] = a[x] * wa + b[x] * wb + c[x] * wc + d[x] * wd;
            }
        }
    });
    out
}

/// Cuts images, which lie in the host's memory, into normalised patches: rows `[3 * patch * patch]` in the order channel,
/// row, column. `index` holds the same number of patches for each image; without it all patches are cut.
pub fn cut_patches(cx: &Context, from: Patches<'_>, index: Option<&[u32]>) -> Vec<f32> {
    let mut rows = vec![0.0; from.elements(index)];
    ew::cut_patches(cx.pool(), from, index, &mut rows);
    rows
}
