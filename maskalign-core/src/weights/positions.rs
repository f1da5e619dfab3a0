//! Learned positions for another grid.

use super::{HostTensor, WeightsError};
use maskalign_engine::{Pool, images::resize_images_bicubic};

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
    let whole = positions.is_shape_only() || positions.data.len() == rows * channels;
    if side == 0 || channels == 0 || side * side + 1 != rows || !whole {
        return Err(refuse("they are not one class row and a square grid"));
    }
    if grid == 0 || grid > 4096 {
        return Err(refuse("the grid's side must be 1 to 4096"));
    }
    if side == grid {
        return Ok(positions.clone());
    }
    if positions.is_shape_only() {
        return Ok(HostTensor::shape_only(vec![1, 1 + grid * grid, channels]));
    }
    let (class, patches) = positions.data.split_at(channels);
    let planes = transposed(patches, side * side, channels);
    let resized = resize_images_bicubic(&Pool::new(1), &planes, [1, channels, side, side], [grid, grid]);
    let mut data = class.to_vec();
    data.extend(transposed(&resized, channels, grid * grid));
    Ok(HostTensor { shape: vec![1, 1 + grid * grid, channels], data })
}

/// Puts a row for the class token before positions `[1,n*n,C]` that have none, as timm keeps those of a tower without a
/// class token; `None` where they have one, or no square grid.
pub fn with_class_row(positions: &HostTensor) -> Option<HostTensor> {
    let &[1, rows, channels] = positions.shape.as_slice() else { return None };
    if rows == 0 || rows.isqrt().pow(2) != rows {
        return None;
    }
    let shape = vec![1, 1 + rows, channels];
    if positions.is_shape_only() {
        return Some(HostTensor::shape_only(shape));
    }
    Some(HostTensor { shape, data: [&vec![0.0; channels], positions.data.as_slice()].concat() })
}

/// The inverse of [`with_class_row`]; `None` for what has no row to be left out.
pub(super) fn without_class_row(positions: &HostTensor) -> Option<HostTensor> {
    let &[1, rows, channels] = positions.shape.as_slice() else { return None };
    let data = positions.data.get(channels..).filter(|rest| !rest.is_empty())?;
    Some(HostTensor { shape: vec![1, rows - 1, channels], data: data.to_vec() })
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
    fn the_class_tokens_row_is_put_before_positions_that_have_none() {
        let positions = HostTensor { shape: vec![1, 4, 2], data: (0..8).map(|v| v as f32).collect() };
        let with = with_class_row(&positions).unwrap();
        assert_eq!((with.shape.as_slice(), &with.data[..3]), (&[1, 5, 2][..], &[0.0, 0.0, 0.0][..]));
        assert_eq!(with_class_row(&with), None);
        assert_eq!(without_class_row(&with), Some(positions));
        assert_eq!(with_class_row(&HostTensor::shape_only(vec![1, 4, 2])).unwrap().shape, [1, 5, 2]);
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
