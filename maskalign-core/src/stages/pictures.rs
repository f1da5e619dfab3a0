//! What features look like: the neighbours of a few images, and many images in a plane.

use maskalign_engine::random::Stream;

use super::{OpenData, StageRun};
use crate::{
    chart::{self, Chart},
    data::{Position, RgbImage, sheet},
    error::Result,
    events::{Drawing, Event, Picture},
};

/// Images whose neighbours are shown.
pub(super) const SEEKERS: usize = 6;
/// Neighbours of each.
pub(super) const NEIGHBOURS: usize = 5;
/// Images of a map: more hide each other.
pub(super) const MAPPED: usize = 1000;
/// Passes of the power iteration: eyes need no more.
const PASSES: usize = 24;

/// Images with their neighbours, by their places in two sets of data.
pub(super) struct Neighbours<'a> {
    /// Whose features they are neighbours by, such as `the student`.
    pub whose: &'a str,
    /// What the images are of.
    pub seekers: &'a OpenData,
    /// What their neighbours are of.
    pub searched: &'a OpenData,
    /// Each image with its neighbours, the nearest first.
    pub found: &'a [(usize, Vec<usize>)],
}

/// Sends the picture of some images and, in a row with each, its neighbours.
///
/// # Errors
/// An image that can be read no more; a picture that cannot be kept.
pub(super) fn show_neighbours(run: &mut StageRun, neighbours: &Neighbours) -> Result<()> {
    let Neighbours { whose, seekers, searched, found } = neighbours;
    let (mut rows, mut alike, mut all) = (Vec::new(), 0, 0);
    for (seeker, found) in *found {
        let label = seekers.images.label(*seeker);
        all += found.len();
        alike += found.iter().filter(|&&place| label.is_some() && searched.images.label(place) == label).count();
        let mut row = images(seekers, vec![*seeker])?;
        row.extend(images(searched, found.clone())?);
        rows.push(row);
    }
    if all == 0 {
        return Ok(());
    }
    let labelled = found.iter().any(|(seeker, _)| seekers.images.label(*seeker).is_some());
    let of_class = if labelled { format!("; {alike} of {all} are of the image's class") } else { String::new() };
    let caption = format!(
        "In each row an image, and to its right its nearest neighbours by the features of {whose}, the nearest first{of_class}"
    );
    send(run, "neighbours", caption, Drawing::Image(sheet(&rows)))
}

/// Sends the map of some images by their features, row by row, each with its place in the data.
///
/// # Errors
/// A picture that cannot be kept.
pub(super) fn show_map(
    run: &mut StageRun,
    whose: &str,
    data: &OpenData,
    places: &[usize],
    features: &[f32],
    width: usize,
) -> Result<()> {
    let components = principal_components(features, width, 2);
    let labels: Vec<Option<usize>> = places.iter().map(|&p| data.images.label(p).map(|l| l as usize)).collect();
    let classes = labels.iter().flatten().max().map_or(0, |most| most + 1);
    let names: Vec<String> = (0..classes).map(data.class_names()).collect();
    let points = (0..places.len()).map(|i| ([components[0][i], components[1][i]], labels[i]));
    let Some(chart) = chart::map(&points.collect::<Vec<_>>(), &names) else { return Ok(()) };
    let caption = format!("{}: the two principal components of the features of {whose}", chart.label());
    send(run, "map", caption, Drawing::Chart(chart))
}

/// Sends a chart, with what it shows as its caption.
///
/// # Errors
/// A picture that cannot be kept.
pub(super) fn show_chart(run: &mut StageRun, name: &str, caption: String, chart: Chart) -> Result<()> {
    send(run, name, caption, Drawing::Chart(chart))
}

fn send(run: &mut StageRun, name: &str, caption: String, drawing: Drawing) -> Result<()> {
    let picture = Picture { stage: run.name.to_owned(), name: name.to_owned(), caption, drawing };
    run.events.send(Event::Picture(&picture))
}

/// Images as towers see them.
fn images(data: &OpenData, places: Vec<usize>) -> Result<Vec<RgbImage>> {
    let mut shown = Vec::new();
    if !places.is_empty() {
        for batch in data.pick(places).pass(1, 0)?.batches(Position::default(), None) {
            let batch = batch?;
            shown.push(RgbImage::from_planes(&batch.images, batch.size.0));
        }
    }
    Ok(shown)
}

/// The first principal components of rows, each row's value along them; by power iteration, from the same start each time.
pub(super) fn principal_components(rows: &[f32], width: usize, components: usize) -> Vec<Vec<f64>> {
    let count = rows.len() / width;
    let mut mean = vec![0.0f64; width];
    for row in rows.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += f64::from(*value) / count as f64);
    }
    let centred: Vec<f64> = rows
        .chunks_exact(width)
        .flat_map(|row| row.iter().zip(&mean).map(|(value, mean)| f64::from(*value) - mean))
        .collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut stream = Stream::new(0, "principal components", 0, 0);
    let mut found: Vec<Vec<f64>> = Vec::new();
    let mut values = Vec::new();
    for _ in 0..components {
        let mut axis: Vec<f64> = (0..width).map(|_| stream.uniform() - 0.5).collect();
        for _ in 0..PASSES {
            let mut next = vec![0.0; width];
            for row in centred.chunks_exact(width) {
                let along = dot(row, &axis);
                next.iter_mut().zip(row).for_each(|(next, value)| *next += along * value);
            }
            for known in &found {
                let along = dot(&next, known);
                next.iter_mut().zip(known).for_each(|(next, value)| *next -= along * value);
            }
            let norm = dot(&next, &next).sqrt();
            if norm == 0.0 {
                break;
            }
            axis = next.into_iter().map(|value| value / norm).collect();
        }
        // Of the two directions the one in which the largest entry grows: pictures do not flip from run to run.
        let largest =
            axis.iter().copied().fold(0.0f64, |most, value| if value.abs() > most.abs() { value } else { most });
        values.push(centred.chunks_exact(width).map(|row| dot(row, &axis) * largest.signum()).collect());
        found.push(axis);
    }
    values
}
