//! A dataset.

use maskalign_core::prelude::*;

/// Drawings of bars: class 0 stands, class 1 lies. Width and place are drawn per image.
#[component]
#[derive(PartialEq)]
pub struct Bars {
    /// Number of images.
    #[schemars(range(min = 1))]
    images: usize,
    /// Side of an image in pixels.
    #[schemars(range(min = 4))]
    size: usize,
}

impl Dataset for Bars {
    fn open(&self) -> Result<Box<dyn Images>, Refusal> {
        Ok(Box::new(self.clone()))
    }

    fn needs_files(&self) -> bool {
        false
    }
}

impl Images for Bars {
    fn len(&self) -> usize {
        self.images
    }

    fn image(&self, index: usize) -> Result<RgbImage, DataError> {
        let mut rng = Stream::new(0, "bars", 0, index as u64);
        let width = 1 + rng.below(self.size / 2);
        let start = rng.below(self.size - width + 1);
        let lies = index % 2 == 1;
        let bright = |i: usize| {
            let (row, column) = (i / self.size, i % self.size);
            let across = if lies { row } else { column };
            if (start..start + width).contains(&across) {
                230
            } else {
                20
            }
        };
        let grey: Vec<u8> = (0..self.size * self.size).map(bright).collect();
        Ok(RgbImage::from_grey(self.size, self.size, &grey))
    }

    fn label(&self, index: usize) -> Option<u32> {
        Some(index as u32 % 2)
    }

    fn classes(&self) -> Option<Vec<String>> {
        Some(vec!["stands".into(), "lies".into()])
    }

    fn name(&self, index: usize) -> String {
        format!("bar {index}")
    }

    fn size(&self) -> Option<(usize, usize)> {
        Some((self.size, self.size))
    }

    fn fingerprint(&self) -> String {
        format!("bars {} {}", self.images, self.size)
    }
}

register!(dataset "bars" => Bars, "drawings of bars that stand or lie", example: "{ type: bars, images: 256, size: 28 }");
