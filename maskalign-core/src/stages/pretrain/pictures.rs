//! What a pre-training stage looks like: masks, attention, features and reconstructions of a few images.

use maskalign_engine::{Context, ImageBatch, Tape, Tensor};

use super::{model::PretrainModel, views::Group};
use crate::{
    chart::heat,
    components::{targets::TargetSource, teachers::Wants, tokens::Masks},
    data::{RgbImage, sheet},
    error::Result,
    events::{Drawing, Picture},
    stages::{MicroBatch, Task, pictures::principal_components},
};

/// Images that are shown.
const IMAGES: usize = 6;
/// What a masked patch keeps of its brightness, so that one sees what was hidden.
const MASKED: f32 = 0.12;
/// How much of a pixel under a weight is the weight's colour; the rest is the image.
const COLOURED: f32 = 0.65;

impl PretrainModel {
    /// Pictures of the first images of a micro-batch: the mask, the attention that it was drawn by, the features of
    /// student and teachers, and the reconstructions of objectives that predict pixels.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub fn pictures(&mut self, cx: &Context, stage: &str, batch: &MicroBatch) -> Result<Vec<Picture>> {
        let count = batch.images.batch.min(IMAGES);
        let size = batch.images.size;
        let images = ImageBatch { pixels: batch.images.pixels[..count * 3 * size * size].to_vec(), batch: count, size };
        let further = |crop: &ImageBatch| ImageBatch {
            pixels: crop.pixels[..count * 3 * crop.size * crop.size].to_vec(),
            batch: count,
            size: crop.size,
        };
        let batch = MicroBatch {
            images,
            crops: batch.crops.iter().map(further).collect(),
            labels: batch.labels[..count].to_vec(),
            indices: batch.indices[..count].to_vec(),
            epoch: batch.epoch,
            progress: batch.progress,
        };
        let shape = self.student().shape();
        let grid = shape.grid;
        if !size.is_multiple_of(grid.rows) {
            // A student that runs at another size than the data's: its patches are no whole pixels here.
            return Ok(Vec::new());
        }
        let shown = Shown {
            originals: batch
                .images
                .pixels
                .chunks_exact(3 * size * size)
                .map(|i| RgbImage::from_planes(i, size))
                .collect(),
            patch: size / grid.rows,
            side: grid.rows,
        };
        let lesson = self.teach(cx, &batch)?;
        // Of several crops, the first is shown.
        let first = Group { crops: vec![0] };
        let masks = lesson.masks_of(&first);
        let targets: Vec<&[Tensor]> = lesson.first_targets().collect();
        let picture = |name: &str, caption: String, rows: &[Vec<RgbImage>]| Picture {
            stage: stage.to_owned(),
            name: name.to_owned(),
            caption,
            drawing: Drawing::Image(sheet(rows)),
        };
        let mut pictures = Vec::new();
        if masks.visible.len() < count * grid.patches() {
            let visible: Vec<RgbImage> = (0..count).map(|i| shown.visible(i, masks.visible_of(i))).collect();
            let seen = match masks.uneven {
                None => format!("the {} of {} patches of each", masks.counts_of(0).visible, grid.patches()),
                Some(_) => format!("which of {} patches of each", grid.patches()),
            };
            let caption = format!(
                "Top row: images of the training data, cut as in a training step. Below: {seen} that the student sees in such \
                 a step; the dark ones are hidden from it"
            );
            pictures.push(picture("masks", caption, &[shown.originals.clone(), visible]));
        }
        if let Some(teacher) = self.attended() {
            let wants = Wants { attention: true, ..Wants::default() };
            let attention = teacher.begin(cx, &batch.images, &wants)?.attention;
            let rows = attention.chunks_exact(grid.patches()).enumerate();
            let rows: Vec<RgbImage> = rows.map(|(i, weights)| shown.heated(i, weights)).collect();
            let caption = format!(
                "Top row: images. Below: the attention that masks are drawn by: how much the class token (CLS, the one token \
                 that stands for the whole image) of the teacher's last block looks at each patch, mean over the attention \
                 heads. {SCALE}"
            );
            pictures.push(picture("attention", caption, &[shown.originals.clone(), rows]));
        }
        let student = self.student();
        if let Some(by_head) = student.class_attention(cx, &batch.images)? {
            pictures.push(picture("attention-student", by_head_of("the student"), &shown.by_head(&by_head)));
        }
        for (name, teacher, _) in self.taught() {
            let by_head = match teacher.shape().grid == grid {
                true => teacher.class_attention(cx, &batch.images)?,
                false => None,
            };
            if let Some(by_head) = by_head {
                let caption = by_head_of(&format!("teacher `{name}`"));
                pictures.push(picture(&format!("attention-of-{name}"), caption, &shown.by_head(&by_head)));
            }
        }
        pictures.push(self.features(cx, &batch.images, &shown, &picture)?);
        self.reconstructions(cx, &batch, &masks, &targets, &shown, &mut |name, caption, rows| {
            pictures.push(picture(name, caption, rows));
        })?;
        // They are none of the training's.
        self.take_times();
        self.take_terms();
        Ok(pictures)
    }

    /// The patches' features of the student, and beside them those of each teacher that an objective matches.
    fn features(
        &self,
        cx: &Context,
        images: &ImageBatch,
        shown: &Shown,
        picture: &dyn Fn(&str, String, &[Vec<RgbImage>]) -> Picture,
    ) -> Result<Picture> {
        let student = self.student();
        let shape = student.shape();
        let features = student.forward(cx, &mut Tape::inference(), images, None, None, &|_| false)?;
        let mut rows =
            vec![shown.originals.clone(), shown.coloured(&features.last, usize::from(shape.cls_token), images.batch)];
        let mut names = vec!["images".to_owned(), "the patches' features after the student's last block".to_owned()];
        for (name, teacher, wants) in self.taught() {
            let Some(level) = wants.levels.last() else { continue };
            let wants = Wants { levels: [*level].into(), whole: true, ..Wants::default() };
            let masks = Masks::all_visible(images.batch, shape.grid.patches());
            let pass = teacher.begin(cx, images, &wants)?;
            let levels = teacher.finish(cx, pass, &wants, &masks)?;
            rows.push(shown.coloured(&levels[level].x, usize::from(teacher.shape().cls_token), images.batch));
            names.push(format!("those of block {level} of teacher `{name}`"));
        }
        let caption = format!(
            "From top to bottom: {}. Within a row, patches of like colour have like features, in one image and across images. \
             The colours mean nothing else, and differ between rows: red, green and blue are the three directions in which \
             the features of a row vary most (principal components)",
            names.join(", ")
        );
        Ok(picture("features", caption, &rows))
    }

    /// What objectives that predict pixels make of the masked patches.
    fn reconstructions(
        &self,
        cx: &Context,
        batch: &MicroBatch,
        masks: &Masks,
        targets: &[&[Tensor]],
        shown: &Shown,
        draw: &mut dyn FnMut(&str, String, &[Vec<RgbImage>]),
    ) -> Result<()> {
        let shape = self.student().shape();
        let is_pixels = |objective: &super::PlannedObjective| {
            let tokens = objective.tokens;
            matches!(objective.target.source, TargetSource::Images(_))
                && tokens.masked
                && !tokens.visible
                && objective.target.width == 3 * shown.patch * shown.patch
        };
        let is_one = self.groups().len() == 1 && self.groups()[0].crops.len() == 1;
        if !self.objectives().any(is_pixels)
            || shape.image_size != batch.images.size
            || !is_one
            || masks.uneven.is_some()
        {
            return Ok(());
        }
        let tape = &mut Tape::inference();
        let kept = |i: usize| self.kept().contains(&i);
        let features = self.student().forward(cx, tape, &batch.images, Some(masks.seen()), None, &kept)?;
        let predictions = self.align(cx, tape, &self.groups()[0], &features, masks)?;
        for ((objective, predictions), targets) in self.objectives().zip(&predictions).zip(targets) {
            let (Some(predictions), true) = (predictions, is_pixels(objective)) else { continue };
            let (predicted, target) = (predictions.outputs[0].to_vec(), targets[0].to_vec());
            let rows = |i: usize| i * masks.counts_of(0).masked * objective.target.width;
            // Whether targets of all images and patches are pixels on one scale is found out of each image.
            let mut is_scaled_by_patch = false;
            let filled = (0..shown.originals.len()).map(|i| {
                let range = rows(i)..rows(i + 1);
                let (masked, target) = (masks.masked_of(i), &target[range.clone()]);
                let pixels = shown.hidden(i, masked);
                let scale = one_scale(target, &pixels);
                is_scaled_by_patch |= scale.is_none();
                shown.filled(i, masked, &predicted[range], target, (&pixels, scale))
            });
            let filled: Vec<RgbImage> = filled.collect();
            let visible = (0..shown.originals.len()).map(|i| shown.visible(i, masks.visible_of(i))).collect();
            let put_back = match is_scaled_by_patch {
                true => {
                    ". It predicts each patch without its brightness and contrast; for this picture the true patch's mean and \
                     spread are put back, so that only what is within a patch is the student's"
                }
                false => "",
            };
            let caption = format!(
                "From top to bottom: images; what the student sees of them; the same with the hidden patches as the student \
                 predicts them (objective `{}`){put_back}",
                objective.name
            );
            let name = format!("reconstructions-{}", objective.name);
            draw(&name, caption, &[shown.originals.clone(), visible, filled]);
        }
        Ok(())
    }
}

/// What the colours of attention mean.
const SCALE: &str = "Yellow: the most of an image; violet: none";

/// What a picture of attention by head shows.
fn by_head_of(whose: &str) -> String {
    format!(
        "Top row: images. Below, a row for each attention head of {whose}'s last block: how much the class token (CLS, the one \
         token that stands for the whole image) looks at each patch. {SCALE}"
    )
}

/// The images that are shown, cut into patches.
struct Shown {
    originals: Vec<RgbImage>,
    /// Side of a patch in pixels.
    patch: usize,
    /// Patches along a side.
    side: usize,
}

impl Shown {
    /// Changes every pixel of a patch: `change` is given the pixel's place in the patch and its three values.
    fn change(&self, image: &mut RgbImage, patch: usize, mut change: impl FnMut(usize, &mut [u8])) {
        let (top, left) = (patch / self.side * self.patch, patch % self.side * self.patch);
        for row in 0..self.patch {
            for column in 0..self.patch {
                let at = 3 * ((top + row) * image.width + left + column);
                change(row * self.patch + column, &mut image.pixels[at..at + 3]);
            }
        }
    }

    /// An image with its masked patches darkened.
    fn visible(&self, image: usize, visible: &[u32]) -> RgbImage {
        let mut weights = vec![MASKED; self.side * self.side];
        for &patch in visible {
            weights[patch as usize] = 1.0;
        }
        self.weighted(image, &weights)
    }

    /// An image in grey under the colours of its patches' weights, from none to the highest: seen on any ground, be it black.
    fn heated(&self, image: usize, weights: &[f32]) -> RgbImage {
        let most = weights.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
        let mut picture = self.originals[image].clone();
        for (patch, weight) in weights.iter().enumerate() {
            let colour = heat(weight / most);
            self.change(&mut picture, patch, |_, pixel| {
                let grey = pixel.iter().map(|value| f32::from(*value)).sum::<f32>() / 3.0;
                for (value, colour) in pixel.iter_mut().zip(colour) {
                    *value = (COLOURED * f32::from(colour) + (1.0 - COLOURED) * grey).round() as u8;
                }
            });
        }
        picture
    }

    /// The images, and below them a row for each head's weights, `[images, heads, patches]`.
    fn by_head(&self, weights: &[f32]) -> Vec<Vec<RgbImage>> {
        let images = self.originals.len();
        let patches = self.side * self.side;
        let heads = weights.len() / (images * patches);
        let row = |head: usize| {
            let heated = |image: usize| self.heated(image, &weights[(image * heads + head) * patches..][..patches]);
            (0..images).map(heated).collect()
        };
        std::iter::once(self.originals.clone()).chain((0..heads).map(row)).collect()
    }

    fn weighted(&self, image: usize, weights: &[f32]) -> RgbImage {
        let mut picture = self.originals[image].clone();
        for (patch, weight) in weights.iter().enumerate() {
            self.change(&mut picture, patch, |_, pixel| {
                for value in pixel {
                    *value = (f32::from(*value) * weight).round() as u8;
                }
            });
        }
        picture
    }

    /// The patches' rows of a tower's states, coloured by their principal components over all images.
    fn coloured(&self, states: &Tensor, before: usize, images: usize) -> Vec<RgbImage> {
        let (patches, width) = (self.side * self.side, states.columns());
        let values = states.to_vec();
        let each = values.len() / images;
        let rows: Vec<f32> =
            (0..images).flat_map(|i| values[i * each + before * width..][..patches * width].iter().copied()).collect();
        let colours = principal_colours(&rows, width);
        let side = self.originals[0].width;
        let paint = |image: usize| {
            let mut picture = RgbImage::black(side, side);
            for patch in 0..patches {
                let colour = colours[image * patches + patch];
                self.change(&mut picture, patch, |_, pixel| pixel.copy_from_slice(&colour));
            }
            picture
        };
        (0..images).map(paint).collect()
    }

    /// The pixels of an image's masked patches, patch by patch.
    fn hidden(&self, image: usize, masked: &[u32]) -> Vec<f32> {
        let width = 3 * self.patch * self.patch;
        let mut picture = self.originals[image].clone();
        let mut pixels = vec![0.0; masked.len() * width];
        for (row, &patch) in masked.iter().enumerate() {
            self.change(&mut picture, patch as usize, |at, pixel| {
                for (channel, value) in pixel.iter().enumerate() {
                    pixels[row * width + 3 * at + channel] = f32::from(*value);
                }
            });
        }
        pixels
    }

    /// An image whose masked patches are what was predicted. Targets are pixels, normalised all alike or patch by patch: the
    /// line that leads from targets back to pixels leads from the prediction to what it means.
    fn filled(
        &self,
        image: usize,
        masked: &[u32],
        predicted: &[f32],
        target: &[f32],
        (pixels, scale): (&[f32], Option<[Line; 3]>),
    ) -> RgbImage {
        let width = 3 * self.patch * self.patch;
        let mut picture = self.originals[image].clone();
        for (row, &patch) in masked.iter().enumerate() {
            let range = row * width..(row + 1) * width;
            let (predicted, target, pixels) = (&predicted[range.clone()], &target[range.clone()], &pixels[range]);
            let lines = scale.unwrap_or_else(|| std::array::from_fn(|channel| Line::through(target, pixels, channel)));
            self.change(&mut picture, patch as usize, |at, pixel| {
                for (channel, value) in pixel.iter_mut().enumerate() {
                    *value = lines[channel].at(predicted[3 * at + channel]).round().clamp(0.0, 255.0) as u8;
                }
            });
        }
        picture
    }
}

/// The lines from all targets of an image to its pixels, one a channel; `None` where each patch has its own.
fn one_scale(target: &[f32], pixels: &[f32]) -> Option<[Line; 3]> {
    let lines: [Line; 3] = std::array::from_fn(|channel| Line::through(target, pixels, channel));
    lines.iter().enumerate().all(|(channel, line)| line.fits(target, pixels, channel)).then_some(lines)
}

/// A line from normalised values of a channel to pixels.
#[derive(Clone, Copy)]
struct Line {
    slope: f32,
    offset: f32,
}

impl Line {
    /// By least squares; level where the values are all the same.
    fn through(from: &[f32], to: &[f32], channel: usize) -> Line {
        let pairs = || from.iter().zip(to).skip(channel).step_by(3).map(|(x, y)| (f64::from(*x), f64::from(*y)));
        let count = pairs().count() as f64;
        let mean = pairs().fold((0.0, 0.0), |sum, pair| (sum.0 + pair.0 / count, sum.1 + pair.1 / count));
        let (mut above, mut below) = (0.0, 0.0);
        for (x, y) in pairs() {
            above += (x - mean.0) * (y - mean.1);
            below += (x - mean.0) * (x - mean.0);
        }
        let slope = if below > 0.0 { above / below } else { 0.0 };
        Line { slope: slope as f32, offset: (mean.1 - slope * mean.0) as f32 }
    }

    fn at(self, value: f32) -> f32 {
        self.slope * value + self.offset
    }

    /// Whether all values lie on it, to half a level.
    fn fits(self, from: &[f32], to: &[f32], channel: usize) -> bool {
        from.iter().zip(to).skip(channel).step_by(3).all(|(x, y)| (self.at(*x) - y).abs() < 0.5)
    }
}

/// The three principal components of rows, each from 0 to 255 over all of them.
fn principal_colours(rows: &[f32], width: usize) -> Vec<[u8; 3]> {
    let components = principal_components(rows, width, 3);
    let mut colours = vec![[0; 3]; rows.len() / width];
    for (component, along) in components.iter().enumerate() {
        let (low, high) = along.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
        for (colour, value) in colours.iter_mut().zip(along) {
            let share = if high > low { (value - low) / (high - low) } else { 0.5 };
            colour[component] = (255.0 * share).round() as u8;
        }
    }
    colours
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn principal_components_are_those_of_the_data() {
        // Points on a line in the plane of the first two axes, and on the third a little that does not grow along it.
        let third = [0.01, -0.01, -0.01, 0.01];
        let rows: Vec<f32> =
            (0..40u8).flat_map(|i| [f32::from(i), 2.0 * f32::from(i), third[usize::from(i % 4)], 7.0]).collect();
        let colours = principal_colours(&rows, 4);
        assert_eq!((colours[0][0], colours[39][0]), (0, 255), "the first grows along the line");
        assert!(colours.windows(2).all(|pair| pair[0][0] < pair[1][0]));
        let second: std::collections::BTreeSet<u8> = colours.iter().map(|colour| colour[1]).collect();
        assert_eq!(second.into_iter().collect::<Vec<_>>(), [0, 255], "the second is the third axis");
    }

    #[test]
    fn a_prediction_that_is_its_target_fills_in_the_image() {
        let grey: Vec<u8> = (0..64u8).map(|i| i.wrapping_mul(37)).collect();
        let shown = Shown { originals: vec![RgbImage::from_grey(8, 8, &grey)], patch: 4, side: 2 };
        let mut target = vec![0.0; 2 * 48];
        for (row, patch) in [1, 2].into_iter().enumerate() {
            let mut copy = shown.originals[0].clone();
            shown.change(&mut copy, patch, |at, pixel| {
                for channel in 0..3 {
                    // Each patch by its own statistics.
                    target[row * 48 + 3 * at + channel] = (f32::from(pixel[channel]) - 100.0 - 9.0 * row as f32) / 31.0;
                }
            });
        }
        let pixels = shown.hidden(0, &[1, 2]);
        assert!(one_scale(&target, &pixels).is_none() && one_scale(&target[..48], &pixels[..48]).is_some());
        assert_eq!(shown.filled(0, &[1, 2], &target, &target, (&pixels, None)), shown.originals[0]);
        let dark = shown.filled(0, &[1], &[-9.0; 48], &target[..48], (&pixels[..48], None));
        assert_eq!((dark.pixels[3 * 4], dark.pixels[0]), (0, shown.originals[0].pixels[0]), "patch 1 alone changes");
    }
}
