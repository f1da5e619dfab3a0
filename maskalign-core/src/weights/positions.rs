//! Learned positions for another grid.

use super::{HostTensor, WeightsError};
use crate::{images::resize_images_bicubic, kernels::Pool};

/// Resizes learned positions `[1,1+n*n,C]` to `[1,1+grid*grid,C]`, bicubically; the first row, that of the class token, is kept.
///
/// CLIP-L/14 at 196 (MaskAlign's third published model) and DINOv2 at 224 resize alike: to the size, without the offset
/// of 0.1 that DINOv2's own code adds by default (the recorded outputs agree with this form alone).
pub fn resize_positions(positions: &HostTensor, grid: usize) -> Result<HostTensor, WeightsError> {
    let refuse =
        |reason: &str| WeightsError::Positions { shape: positions.shape.clone(), grid, reason: reason.to_owned() };
    let &[1, rows, channels] = positions.shape.as_slice() else {
        return Err(refuse("expected [1, 1 + n * n, channels]"));
    };
    let side = rows.saturating_sub(1).isqrt();
    if side == 0 || channels == 0 || side * side + 1 != rows || positions.data.len() != rows * channels {
        return Err(refuse("they are not one class row and a square grid"));
    }
    if grid == 0 || grid > 4096 {
        return Err(refuse("the grid's side must be 1 to 4096"));
    }
    if side == grid {
        return Ok(positions.clone());
    }
    let (class, patches) = positions.data.split_at(channels);
    let planes = transposed(patches, side * side, channels);
    let resized = resize_images_bicubic(&Pool::new(1), &planes, [1, channels, side, side], [grid, grid]);
    let mut data = class.to_vec();
    data.extend(transposed(&resized, channels, grid * grid));
    Ok(HostTensor { shape: vec![1, 1 + grid * grid, channels], data })
}

/// `[rows, columns]` -> `[columns, rows]`.
pub(super) fn transposed(data: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| data[row * columns + column])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_equal_size_changes_nothing() {
        let positions = HostTensor { shape: vec![1, 10, 2], data: (0..20).map(|v| v as f32).collect() };
        assert_eq!(resize_positions(&positions, 3).unwrap(), positions);
    }

    #[test]
    fn positions_that_are_no_square_are_refused() {
        for shape in [vec![1, 9, 2], vec![1, 1, 2], vec![10, 2], vec![2, 10, 2], vec![1, 0, 2], vec![1, 10, 0]] {
            let positions = HostTensor { data: vec![0.0; shape.iter().product()], shape };
            let error = resize_positions(&positions, 4).unwrap_err().to_string();
            assert!(error.contains("to a grid of 4 x 4"), "{error}");
        }
    }
}
