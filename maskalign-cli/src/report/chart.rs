//! Curves as SVG, drawn by plotters. Colours that follow the reader's scheme are left to the page's style.

use plotters::prelude::*;

/// Okabe and Ito's colours, which the colour-blind tell apart; readable on white and on black.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(153, 153, 153),
];
const SIZE: (u32, u32) = (560, 300);
/// Points of a curve: more than pixels show nothing.
const MOST_POINTS: usize = 400;

/// A curve with its name.
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// The chart of curves over epochs, with what it shows in words for those who do not see it; `None` where there is
/// nothing to draw.
pub(super) fn svg(title: &str, curves: &[Curve]) -> Option<String> {
    let curves: Vec<(&str, Vec<(f64, f64)>)> = curves
        .iter()
        .map(|curve| (curve.name.as_str(), thinned(&curve.points)))
        .filter(|(_, p)| !p.is_empty())
        .collect();
    let all = || curves.iter().flat_map(|(_, points)| points);
    let range = |value: fn(&(f64, f64)) -> f64| {
        let (low, high) = all().map(value).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        (low <= high).then(|| {
            if low == high { (low - 0.5 * low.abs().max(1e-9), high + 0.5 * high.abs().max(1e-9)) } else { (low, high) }
        })
    };
    let (x, y) = (range(|point| point.0)?, range(|point| point.1)?);
    let room = 0.05 * (y.1 - y.0);
    let mut text = String::new();
    draw(&mut text, (x.0..x.1, (y.0 - room)..(y.1 + room)), &curves).ok()?;
    let said: Vec<String> = curves
        .iter()
        .map(|(name, points)| {
            let (first, last) = (points[0], points[points.len() - 1]);
            format!("{name}: from {} to {}", short(first.1), short(last.1))
        })
        .collect();
    let label = escape(&format!("{title} by epoch. {}", said.join("; ")));
    // The page sets the size.
    let text = text.replacen(
        &format!("width=\"{}\" height=\"{}\"", SIZE.0, SIZE.1),
        &format!("role=\"img\" aria-label=\"{label}\""),
        1,
    );
    Some(text)
}

fn draw(
    text: &mut String,
    (x, y): (std::ops::Range<f64>, std::ops::Range<f64>),
    curves: &[(&str, Vec<(f64, f64)>)],
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    let mut chart =
        ChartBuilder::on(&root).margin(8).x_label_area_size(34).y_label_area_size(64).build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("epoch")
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|value| short(*value))
        .y_label_formatter(&|value| short(*value))
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 15))
        .draw()?;
    for ((name, points), colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let style = colour.stroke_width(2);
        match points[..] {
            [point] => chart.draw_series(std::iter::once(Circle::new(point, 4, colour.filled())))?.label(*name),
            _ => chart.draw_series(LineSeries::new(points.iter().copied(), style))?.label(*name),
        }
        .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], style));
    }
    if curves.len() > 1 {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .label_font(("sans-serif", 15))
            .background_style(TRANSPARENT)
            .draw()?;
    }
    root.present()?;
    Ok(())
}

/// A curve with few points: the means of equally long pieces.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let piece = finite.len().div_ceil(MOST_POINTS).max(1);
    let mean = |piece: &[(f64, f64)]| {
        let count = piece.len() as f64;
        let sum = piece.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    finite.chunks(piece).map(mean).collect()
}

/// A number with three digits that say something.
pub(super) fn short(value: f64) -> String {
    let size = value.abs();
    match () {
        () if value == 0.0 => "0".to_owned(),
        () if !(1e-3..1e5).contains(&size) => format!("{value:.1e}"),
        () => {
            let digits = (2 - size.log10().floor() as i32).clamp(0, 5) as usize;
            let text = format!("{value:.digits$}");
            match text.contains('.') {
                true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
                false => text,
            }
        }
    }
}

/// Text as HTML shows it.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (0.12345, "0.123"),
            (12.0, "12"),
            (0.5, "0.5"),
            (1234.0, "1234"),
            (2.5e-5, "2.5e-5"),
            (-0.25, "-0.25"),
        ] {
            assert_eq!(short(value), text);
        }
    }

    #[test]
    fn long_curves_are_thinned_by_means_and_what_is_not_finite_is_left_out() {
        let points: Vec<(f64, f64)> =
            (0..1000).map(|i| (f64::from(i), if i == 500 { f64::NAN } else { 2.0 })).collect();
        let thin = thinned(&points);
        assert!(thin.len() <= MOST_POINTS && thin.len() > MOST_POINTS / 2);
        assert!(thin.iter().all(|point| point.1 == 2.0));
        let svg = svg("loss & more", &[Curve { name: "a<b".to_owned(), points }]).expect("a chart");
        assert!(svg.contains("aria-label=\"loss &amp; more by epoch. a&lt;b: from 2 to 2\""), "{}", &svg[..200]);
        assert!(super::svg("nothing", &[Curve { name: "a".to_owned(), points: Vec::new() }]).is_none());
    }
}
