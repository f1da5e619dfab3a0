//! The nearest neighbours of some features among others that come in blocks.
//!
//! The search is exact: every similarity is computed. Of the features that are searched, one block is there at a time, so
//! that their number costs no memory.

use std::sync::{Mutex, PoisonError};

use maskalign_engine::{
    Context, Tape, Tensor,
    ops::{self, Act, LinearWeights},
};

use super::memory::LISTED;
use crate::error::Result;

/// Seekers whose lists one task keeps.
const GROUP: usize = 32;

/// One of the nearest among the searched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Neighbour {
    /// The cosine of the angle between the two features.
    pub similarity: f32,
    /// Its place among the searched.
    pub place: u32,
}

/// Features that seek their neighbours: the seekers.
pub(super) struct Search {
    /// Neighbours of each.
    k: usize,
    /// Features that were searched so far.
    searched: usize,
    blocks: Vec<Seekers>,
}

/// A block of seekers.
struct Seekers {
    features: LinearWeights,
    groups: Vec<Mutex<Group>>,
}

/// Neighbours that some seekers found so far.
struct Group {
    /// For each seeker, what a similarity has to exceed: the k-th of what was found when its list was cut last.
    floors: Vec<f32>,
    /// For each seeker, up to [`LISTED`] times as many as are wanted, in no order.
    found: Vec<Vec<Neighbour>>,
}

impl Search {
    /// A search for the `k` nearest of each feature, without any seeker.
    pub(super) fn new(k: usize) -> Search {
        Search { k, searched: 0, blocks: Vec::new() }
    }

    /// Adds seekers: features of length 1, `[seekers, width]`.
    pub(super) fn add(&mut self, features: Tensor) {
        let group = |first: usize| {
            let seekers = GROUP.min(features.rows() - first);
            let found = (0..seekers).map(|_| Vec::with_capacity(LISTED * self.k)).collect();
            Mutex::new(Group { floors: vec![f32::NEG_INFINITY; seekers], found })
        };
        let groups = (0..features.rows()).step_by(GROUP).map(group).collect();
        self.blocks.push(Seekers { features: LinearWeights { weight: features, bias: None, packed: None }, groups });
    }

    /// Searches a block of features of length 1, `[searched, width]`.
    ///
    /// # Errors
    /// Out of memory on the device.
    pub(super) fn search(&mut self, cx: &Context, block: &Tensor) -> Result<()> {
        for seekers in &self.blocks {
            let similarities = ops::linear(cx, &mut Tape::inference(), block, &seekers.features, Act::None)?;
            let (values, columns) = (similarities.values(), similarities.columns());
            // A seeker's list depends on no other's: results are the same for any number of threads.
            cx.pool().run(seekers.groups.len(), &|at| {
                let mut group = seekers.groups[at].lock().unwrap_or_else(PoisonError::into_inner);
                for (row, values) in values.chunks_exact(columns).enumerate() {
                    let place = (self.searched + row) as u32;
                    group.meet(&values[at * GROUP..], place, self.k);
                }
            });
        }
        self.searched += block.rows();
        Ok(())
    }

    /// Some seekers' features, row by row, by their places in the order in which they were added, and their width.
    pub(super) fn seekers(&self, wanted: &[usize]) -> (Vec<f32>, usize) {
        rows_of(self.blocks.iter().map(|block| &block.features.weight), wanted)
    }

    /// The nearest of each seeker in the order in which those were added, the nearest first; of equally near ones the
    /// earlier first.
    pub(super) fn finish(self) -> impl Iterator<Item = Vec<Neighbour>> {
        let groups = self.blocks.into_iter().flat_map(|seekers| seekers.groups);
        groups.flat_map(|group| group.into_inner().unwrap_or_else(PoisonError::into_inner).found).map(
            move |mut found| {
                found.sort_unstable_by(|a, b| nearer(*a, *b));
                found.truncate(self.k);
                found
            },
        )
    }
}

/// Some rows of blocks, by their places in ascending order, and their width.
pub(super) fn rows_of<'t>(blocks: impl Iterator<Item = &'t Tensor>, wanted: &[usize]) -> (Vec<f32>, usize) {
    let (mut found, mut first, mut width) = (Vec::new(), 0, 0);
    for block in blocks {
        width = block.columns();
        let (rows, values) = (block.rows(), block.values());
        for at in wanted.iter().filter(|at| (first..first + rows).contains(at)) {
            found.extend_from_slice(&values[(at - first) * width..][..width]);
        }
        first += rows;
    }
    (found, width)
}

/// Rows that are searched, and that seek, together.
const ROWS: usize = 4096;

/// The `k` nearest without the seeker itself, which is among them.
pub(super) fn others(own: usize, found: Vec<Neighbour>, k: usize) -> Vec<(usize, f32)> {
    let found = found.into_iter().map(|one| (one.place as usize, one.similarity));
    found.filter(|(place, _)| *place != own).take(k).collect()
}

/// The `k` nearest others of each of some features of length 1, `[rows, width]`: place and cosine, the nearest first. There
/// are fewer where there are not as many others.
///
/// # Errors
/// Out of memory on the device.
pub fn nearest_others(cx: &Context, features: &[f32], width: usize, k: usize) -> Result<Vec<Vec<(usize, f32)>>> {
    // Each is its own nearest, and left out.
    let mut search = Search::new(k + 1);
    let blocks = || features.chunks(ROWS * width);
    for block in blocks() {
        search.add(cx.tensor(block.to_vec(), block.len() / width, width)?);
    }
    for block in blocks() {
        search.search(cx, &cx.tensor(block.to_vec(), block.len() / width, width)?)?;
    }
    Ok(search.finish().enumerate().map(|(own, found)| others(own, found, k)).collect())
}

impl Group {
    /// Shows one of the searched to all seekers: its similarity to each, and perhaps to seekers of other groups behind them.
    fn meet(&mut self, similarities: &[f32], place: u32, k: usize) {
        for ((floor, found), &similarity) in self.floors.iter_mut().zip(&mut self.found).zip(similarities) {
            // What is as near as the k-th and comes later is farther.
            if similarity > *floor {
                // A sum of zeros may be negative, and would be sorted behind one that is not.
                found.push(Neighbour { similarity: similarity + 0.0, place });
                if found.len() == LISTED * k {
                    found.select_nth_unstable_by(k - 1, |a, b| nearer(*a, *b));
                    found.truncate(k);
                    *floor = found[k - 1].similarity;
                }
            }
        }
    }
}

fn nearer(a: Neighbour, b: Neighbour) -> std::cmp::Ordering {
    b.similarity.total_cmp(&a.similarity).then(a.place.cmp(&b.place))
}

#[cfg(test)]
mod tests {
    use maskalign_engine::{Device, random::Stream};

    use super::*;

    fn random(rows: usize, width: usize, purpose: &str) -> Vec<f32> {
        let mut stream = Stream::new(0, purpose, 0, 0);
        // Few values: many similarities are equal.
        (0..rows * width).map(|_| stream.below(3) as f32 - 1.0).collect()
    }

    /// Whatever the blocks and the number of threads, the neighbours are those of a sort of all similarities.
    #[test]
    fn neighbours_are_those_of_a_whole_sort() {
        let (seekers, searched, width) = (70, 301, 5);
        let (a, b) = (random(seekers, width, "seekers"), random(searched, width, "searched"));
        for (threads, block, k) in [(1, 301, 1), (1, 64, 7), (2, 1, 7), (3, 100, 301), (2, 64, 300)] {
            let cx = Context::new(Device::Cpu, threads);
            let mut search = Search::new(k);
            let rows = |values: &[f32]| cx.tensor(values.to_vec(), values.len() / width, width).unwrap();
            a.chunks(block * width).for_each(|part| search.add(rows(part)));
            b.chunks(block * width).for_each(|part| search.search(&cx, &rows(part)).unwrap());
            for (found, seeker) in search.finish().zip(a.chunks_exact(width)) {
                let similarity = |other: &[f32]| seeker.iter().zip(other).map(|(a, b)| a * b).sum::<f32>() + 0.0;
                let all = b.chunks_exact(width).enumerate();
                let mut all: Vec<_> = all.map(|(place, other)| (similarity(other), place as u32)).collect();
                all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
                let found: Vec<_> = found.iter().map(|found| (found.similarity, found.place)).collect();
                assert_eq!(found, all[..k], "{threads} threads, blocks of {block}, k {k}");
            }
        }
    }
}
