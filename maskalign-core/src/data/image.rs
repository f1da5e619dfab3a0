//! An image in memory.

/// An image of 8-bit red, green and blue.
///
/// ```
/// # use maskalign_core::prelude::*;
/// let image = RgbImage::from_grey(2, 1, &[0, 255]);
/// assert_eq!((image.size(), &image.pixels[3..]), ((2, 1), &[255; 3][..]));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` values: row by row, pixel by pixel, red, green and blue.
    pub pixels: Vec<u8>,
}

impl RgbImage {
    /// A black image.
    pub fn black(width: usize, height: usize) -> Self {
        Self { width, height, pixels: vec![0; width * height * 3] }
    }

    /// An image from one brightness a pixel, row by row.
    pub fn from_grey(width: usize, height: usize, grey: &[u8]) -> Self {
        debug_assert_eq!(grey.len(), width * height);
        Self { width, height, pixels: grey.iter().flat_map(|&value| [value; 3]).collect() }
    }

    /// `(width, height)` in pixels.
    pub fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// The square image of `[3, side, side]` numbers in [0, 1].
    pub fn from_planes(planes: &[f32], side: usize) -> Self {
        let area = side * side;
        debug_assert_eq!(planes.len(), 3 * area);
        let value = |at: usize| (255.0 * planes[at]).round().clamp(0.0, 255.0) as u8;
        let pixels = (0..area).flat_map(|i| [value(i), value(area + i), value(2 * area + i)]).collect();
        Self { width: side, height: side, pixels }
    }

    /// Writes the image as `[3, height, width]` numbers in [0, 1]: each value / 255, as torchvision's `ToTensor` does.
    /// `planes` has `3 * height * width` elements.
    pub fn write_planes(&self, planes: &mut [f32]) {
        let area = self.width * self.height;
        debug_assert_eq!(planes.len(), 3 * area);
        let (red, rest) = planes.split_at_mut(area);
        let (green, blue) = rest.split_at_mut(area);
        for (pixel, ((red, green), blue)) in self.pixels.chunks_exact(3).zip(red.iter_mut().zip(green).zip(blue)) {
            *red = f32::from(pixel[0]) / 255.0;
            *green = f32::from(pixel[1]) / 255.0;
            *blue = f32::from(pixel[2]) / 255.0;
        }
    }
}

/// A box of pixels inside an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crop {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows, at least 1.
    pub height: usize,
    /// Columns, at least 1.
    pub width: usize,
}

impl Crop {
    /// The box that holds a whole image.
    pub fn whole(image: &RgbImage) -> Self {
        Self { top: 0, left: 0, height: image.height, width: image.width }
    }
}

/// Where a place beyond the edge of `count` pixels is found when they are reflected, the outermost not repeated, as often
/// as it takes.
pub(crate) fn reflected(place: isize, count: usize) -> usize {
    if count <= 1 {
        return 0;
    }
    let last = count as isize - 1;
    let along = place.rem_euclid(2 * last);
    along.min(2 * last - along) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_are_channel_first_and_divided_by_255() {
        let image = RgbImage { width: 2, height: 1, pixels: vec![0, 51, 255, 102, 1, 2] };
        let mut planes = [0.0; 6];
        image.write_planes(&mut planes);
        assert_eq!(planes, [0.0, 0.4, 0.2, 1.0 / 255.0, 1.0, 2.0 / 255.0]);
    }
}
