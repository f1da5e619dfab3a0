//! Pillow's conversions to RGB.

/// Colours by number.
pub(super) struct Palette(Vec<[u8; 3]>);

impl Palette {
    /// From red, green and blue of each colour.
    pub(super) fn rgb(bytes: &[u8]) -> Self {
        Self(bytes.chunks_exact(3).map(|colour| [colour[0], colour[1], colour[2]]).collect())
    }

    /// From the colours themselves.
    pub(super) fn new(colours: Vec<[u8; 3]>) -> Self {
        Self(colours)
    }

    /// A colour; black beyond the last.
    pub(super) fn colour(&self, index: u8) -> [u8; 3] {
        self.0.get(usize::from(index)).copied().unwrap_or_default()
    }

    /// Whether each colour is the grey of its own number. Pillow then takes the numbers as brightness, also those beyond
    /// the last.
    pub(super) fn is_grey_ramp(&self) -> bool {
        self.0.iter().enumerate().all(|(index, colour)| colour.iter().all(|&value| usize::from(value) == index))
    }
}

/// Four inks, 255 being full, to what they leave of the light: Pillow's integer formula.
pub(super) fn cmyk_to_rgb(inks: [u8; 3], black: u8) -> [u8; 3] {
    let left = 255 - u32::from(black);
    inks.map(|ink| (left - divided_by_255(u32::from(ink) * left)) as u8)
}

/// `value / 255` to the nearest whole number, for products of two bytes.
fn divided_by_255(value: u32) -> u32 {
    let value = value + 128;
    ((value >> 8) + value) >> 8
}

/// JFIF's conversion in 16-bit fixed point, rounded as libjpeg does.
pub(super) fn ycc_to_rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    // 1.402, 0.34414, 0.71414 and 1.772 of 65,536.
    [91_881 * cr, -22_554 * cb - 46_802 * cr, 116_130 * cb]
        .map(|chroma| (y + ((chroma + 32_768) >> 16)).clamp(0, 255) as u8)
}

/// Pillow's own conversion, in 6-bit fixed point; what JPEG holds goes through [`ycc_to_rgb`].
pub(super) fn pillow_ycc_to_rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    let term = |factor: f64, chroma: u8| (factor * (f64::from(chroma) - 128.0) * 64.0 + 0.5).trunc() as i32;
    [term(1.402, cr), term(-0.34414, cb) + term(-0.71414, cr), term(1.772, cb)]
        .map(|chroma| (i32::from(y) + (chroma >> 6)).clamp(0, 255) as u8)
}

/// Numbers below `2^bits` in rows of whole bytes, the first in the highest bits; `bits` is 1, 2, 4 or 8.
pub(super) fn unpack(row: &[u8], bits: usize, count: usize) -> impl Iterator<Item = u8> + '_ {
    let per_byte = 8 / bits;
    let mask = ((1u16 << bits) - 1) as u8;
    (0..count).map(move |at| row[at / per_byte] >> (8 - bits * (at % per_byte + 1)) & mask)
}
