//! Fixed position embeddings.

/// Two-dimensional sin-cos position embeddings `[1 + rows * columns, dim]`, with a row of zeros first for the class token.
/// The first half of the channels encodes the column, the second half the row (MAE's `get_2d_sincos_pos_embed`).
pub fn sincos_positions(dim: usize, rows: usize, columns: usize) -> Vec<f32> {
    let quarter = dim / 4;
    let omega: Vec<f64> = (0..quarter).map(|i| 1.0 / 10000f64.powf(i as f64 / (dim as f64 / 4.0))).collect();
    let mut out = vec![0.0; (1 + rows * columns) * dim];
    for y in 0..rows {
        for x in 0..columns {
            let row = &mut out[(1 + y * columns + x) * dim..][..dim];
            for (half, at) in [x, y].into_iter().enumerate() {
                for (i, &w) in omega.iter().enumerate() {
                    let angle = at as f64 * w;
                    row[half * 2 * quarter + i] = angle.sin() as f32;
                    row[half * 2 * quarter + quarter + i] = angle.cos() as f32;
                }
            }
        }
    }
    out
}
