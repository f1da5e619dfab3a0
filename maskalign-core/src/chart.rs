//! Curves, matrices and maps as SVG, drawn by plotters.
//!
//! Text and ground follow the reader's scheme, light or dark: a page sets them where it takes a chart in, a file has a style
//! of its own.

use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

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
/// Pixels of a chart of curves, and of a map.
const SIZE: (u32, u32) = (560, 300);
const MAP_SIZE: (u32, u32) = (560, 400);
/// Points of a curve: more than pixels show nothing.
const MOST_POINTS: usize = 400;
/// Rows and columns of a matrix that can still be read.
pub const MOST_CLASSES: usize = 20;
/// Letters of a class's name that there is room for.
const MOST_LETTERS: usize = 18;
/// Frames and marks, readable on white and on black.
const GREY: RGBColor = RGBColor(128, 128, 128);
/// How dark a matrix's fullest cell is: its number is read on it, in a light and in a dark scheme.
const FULLEST: f64 = 0.6;

/// A chart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chart {
    svg: String,
    label: String,
}

impl Chart {
    /// What there is to see, in words.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The element as a page takes it in, as wide as there is room, with words for those who do not see it. Its text and
    /// ground are left to the page's style.
    pub fn inline(&self) -> String {
        let (open, rest) = self.svg.split_once('>').expect("an element");
        let (_, view) = open.split_once(" viewBox").expect("plotters says the size twice");
        format!("<svg role=\"img\" aria-label=\"{}\" viewBox{view}>{rest}", escape(&self.label))
    }

    /// The chart as a file.
    pub fn file(&self) -> String {
        let (open, rest) = self.svg.split_once('>').expect("an element");
        format!("{open}>\n<title>{}</title>\n{STYLE}{rest}", escape(&self.label))
    }
}

/// What a page sets of an inline chart, for a file; an image in a page follows the reader's scheme too.
const STYLE: &str = "<style>
text { fill: #1b1b1b; } .ground { fill: #ffffff; } [stroke='#000000'] { stroke: #5f6368; }
@media (prefers-color-scheme: dark) {
  text { fill: #e8eaed; } .ground { fill: #1e2226; } [stroke='#000000'] { stroke: #a5abb3; }
}
</style>
<rect class=\"ground\" width=\"100%\" height=\"100%\"/>
";

/// Height of a row of a legend, and the width of a letter and of what is beside a name there, in pixels.
const LEGEND_ROW: i32 = 22;
const LETTER: i32 = 8;
const BESIDE: i32 = 44;

/// A curve with its name.
#[derive(Clone, Debug)]
pub struct Curve {
    /// What it is called.
    pub name: String,
    /// Epochs and values.
    pub points: Vec<(f64, f64)>,
    /// What stands for its end.
    pub end: End,
}

/// What is said to be the value of a curve at its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The last value, of what does not waver.
    Last,
    /// The mean over the last epoch, of what each batch has its own of.
    MeanOfEpoch,
}

impl Curve {
    /// The value at its end; `None` without a value that is finite.
    ///
    /// ```
    /// # use maskalign_core::chart::{Curve, End};
    /// let points = vec![(0.0, 9.0), (1.0, 2.0), (1.5, 1.0)];
    /// let curve = Curve { name: "loss".into(), points, end: End::MeanOfEpoch };
    /// assert_eq!(curve.at_end(), Some(1.5), "what came before is no part of the last epoch");
    /// assert_eq!(Curve { end: End::Last, ..curve }.at_end(), Some(1.0));
    /// ```
    pub fn at_end(&self) -> Option<f64> {
        let finite = || self.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite());
        let (last, value) = *finite().next_back()?;
        match self.end {
            End::Last => Some(value),
            End::MeanOfEpoch => {
                // A step stands at the epoch at which it began: the last epoch is whole if the next step begins another. Where
                // one goes on, it and the one before count, as in the results of a stage.
                let step = finite().rev().nth(1).map_or(0.0, |(before, _)| last - before);
                let is_whole = last + step >= last.floor() + 1.0 - 1e-6;
                let from = if is_whole { last.floor() } else { last.floor() - 1.0 };
                let recent = finite().filter(|(x, _)| *x >= from - 1e-9).map(|(_, y)| *y);
                let (sum, count) = recent.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
                Some(sum / count)
            }
        }
    }
}

/// The chart of curves over epochs; `None` where there is nothing to draw.
///
/// ```
/// # use maskalign_core::chart::{Curve, End, curves};
/// let loss = Curve { name: "loss".into(), points: vec![(0.0, 2.0), (1.0, 0.5)], end: End::MeanOfEpoch };
/// let chart = curves("Loss", &[loss]).expect("two points");
/// assert_eq!(chart.label(), "Loss by epoch. loss: from 2 to 0.5");
/// assert!(chart.file().starts_with("<svg ") && chart.inline().starts_with("<svg role=\"img\""));
/// ```
pub fn curves(title: &str, curves: &[Curve]) -> Option<Chart> {
    let said = curves.iter().filter_map(|curve| {
        let first = curve.points.iter().find(|(x, y)| x.is_finite() && y.is_finite())?;
        let mean =
            if curve.end == End::MeanOfEpoch && curve.points.len() > 2 { ", mean of the last epoch" } else { "" };
        Some(format!("{}: from {} to {}{mean}", curve.name, short(first.1), short(curve.at_end()?)))
    });
    let said: Vec<String> = said.collect();
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
    let rows = legend(&curves);
    let height = SIZE.1 + LEGEND_ROW as u32 * rows.len() as u32;
    chart((SIZE.0, height), format!("{title} by epoch. {}", said.join("; ")), |area| {
        draw(area, (x.0..x.1, (y.0 - room)..(y.1 + room)), &curves)?;
        draw_legend(area, &rows)
    })
}

/// The names of several curves with their colours and places across, in rows that are as wide as a chart; of one curve none.
fn legend<'c>(curves: &[(&'c str, Vec<(f64, f64)>)]) -> Vec<Vec<(&'c str, RGBColor, i32)>> {
    let mut rows: Vec<Vec<(&str, RGBColor, i32)>> = Vec::new();
    let mut across = i32::MAX;
    for ((name, _), colour) in curves.iter().zip(COLOURS.into_iter().cycle()).filter(|_| curves.len() > 1) {
        let width = BESIDE + LETTER * name.chars().count() as i32;
        if across.saturating_add(width) > SIZE.0 as i32 {
            rows.push(Vec::new());
            across = 16;
        }
        if let Some(row) = rows.last_mut() {
            row.push((*name, colour, across));
        }
        across += width;
    }
    rows
}

fn draw_legend(area: &Area, rows: &[Vec<(&str, RGBColor, i32)>]) -> Drawn {
    for (row, names) in rows.iter().enumerate() {
        let y = SIZE.1 as i32 + LEGEND_ROW * row as i32 + LEGEND_ROW / 2 - 4;
        for (name, colour, x) in names {
            area.draw(&PathElement::new(vec![(*x, y), (x + 18, y)], colour.stroke_width(3)))?;
            let style = text_at(15, HPos::Left, FontTransform::None);
            area.draw(&Text::new((*name).to_owned(), (x + 24, y), style))?;
        }
    }
    Ok(())
}

fn draw(
    area: &Area,
    (x, y): (std::ops::Range<f64>, std::ops::Range<f64>),
    curves: &[(&str, Vec<(f64, f64)>)],
) -> Drawn {
    let (area, _) = area.split_vertically(SIZE.1);
    // Round-off beside what an axis spans is nothing.
    let on = |axis: &std::ops::Range<f64>| {
        let least = 1e-9 * (axis.end - axis.start);
        move |value: &f64| short(if value.abs() < least { 0.0 } else { *value })
    };
    let (on_x, on_y) = (on(&x), on(&y));
    let mut chart =
        ChartBuilder::on(&area).margin(8).x_label_area_size(34).y_label_area_size(64).build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("epoch")
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&on_x)
        .y_label_formatter(&on_y)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 15))
        .draw()?;
    for ((_, points), colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        match points[..] {
            [point] => chart.draw_series(std::iter::once(Circle::new(point, 4, colour.filled())))?,
            _ => chart.draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))?,
        };
    }
    Ok(())
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// A chart of a given size, in pixels.
fn chart(size: (u32, u32), label: String, draw: impl FnOnce(&Area) -> Drawn) -> Option<Chart> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw(&area).and_then(|()| Ok(area.present()?)).ok()?;
    }
    Some(Chart { svg, label })
}

fn text_at(size: u32, horizontal: HPos, turned: FontTransform) -> TextStyle<'static> {
    let font = ("sans-serif", size).into_font().transform(turned);
    TextStyle::from(font).color(&BLACK).pos(Pos::new(horizontal, VPos::Center))
}

/// A name that there is room for.
fn short_name(name: &str) -> String {
    match name.chars().count() > MOST_LETTERS {
        true => name.chars().take(MOST_LETTERS - 3).chain("...".chars()).collect(),
        false => name.to_owned(),
    }
}

/// The colour of a share from 0 to 1: viridis, which is brighter the higher the share and which the colour-blind read too.
///
/// ```
/// # use maskalign_core::chart::heat;
/// assert_eq!((heat(0.0), heat(1.0)), ([68, 1, 84], [254, 232, 37]));
/// assert_eq!(heat(f32::NAN), heat(0.0));
/// ```
pub fn heat(share: f32) -> [u8; 3] {
    // The map panics at what is no number, which attention of weights that are no good may be.
    let share = if share.is_nan() { 0.0 } else { share.clamp(0.0, 1.0) };
    let RGBColor(red, green, blue) = ViridisRGB.get_color(share);
    [red, green, blue]
}

/// What images of a class were taken for: `counts[row][column]` images of class `names[row]` were taken for
/// `names[column]`. A cell is the darker the greater its share of its row. `None` for no class, or for more than
/// [`MOST_CLASSES`].
///
/// ```
/// # use maskalign_core::chart::confusion;
/// let names = ["cat", "dog"].map(String::from);
/// let chart = confusion(&names, &[vec![8, 2], vec![0, 10]]).expect("two classes");
/// assert_eq!(chart.label(), "Confusion matrix of 2 classes: 90 % on the diagonal");
/// ```
pub fn confusion(names: &[String], counts: &[Vec<u64>]) -> Option<Chart> {
    let classes = names.len();
    if !(1..=MOST_CLASSES).contains(&classes) {
        return None;
    }
    let all: u64 = counts.iter().flatten().sum();
    let right: u64 = (0..classes).map(|class| counts[class][class]).sum();
    let percent = short(100.0 * right as f64 / all.max(1) as f64);
    let label = format!("Confusion matrix of {classes} classes: {percent} % on the diagonal");
    let names: Vec<String> = names.iter().map(|name| short_name(name)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0) as i32;
    let (cell, letters) = (if classes <= 10 { 40 } else { 30 }, 8 * longest + 16);
    let (left, top) = (letters + 24, 16);
    let side = cell * classes as i32;
    let size = ((left + side + 16) as u32, (top + side + letters + 28) as u32);
    chart(size, label, |area| {
        for (row, counts) in counts.iter().enumerate() {
            let images = counts.iter().sum::<u64>().max(1) as f64;
            for (column, &count) in counts.iter().enumerate() {
                let (x, y) = (left + cell * column as i32, top + cell * row as i32);
                let colour = COLOURS[0].mix(FULLEST * count as f64 / images);
                area.draw(&Rectangle::new([(x, y), (x + cell, y + cell)], colour.filled()))?;
                area.draw(&Rectangle::new([(x, y), (x + cell, y + cell)], GREY.mix(0.4)))?;
                if count > 0 {
                    let number = if count < 10_000 { count.to_string() } else { format!("{:.0}k", count as f64 / 1e3) };
                    let style = text_at(12, HPos::Center, FontTransform::None);
                    area.draw(&Text::new(number, (x + cell / 2, y + cell / 2), style))?;
                }
            }
        }
        for (class, name) in names.iter().enumerate() {
            let middle = cell * class as i32 + cell / 2;
            let style = text_at(13, HPos::Right, FontTransform::None);
            area.draw(&Text::new(name.clone(), (left - 8, top + middle), style))?;
            let style = text_at(13, HPos::Right, FontTransform::Rotate270);
            area.draw(&Text::new(name.clone(), (left + middle, top + side + 8), style))?;
        }
        let style = text_at(13, HPos::Center, FontTransform::Rotate270);
        area.draw(&Text::new("class", (10, top + side / 2), style))?;
        let style = text_at(13, HPos::Center, FontTransform::None);
        area.draw(&Text::new("taken for", (left + side / 2, top + side + letters + 14), style))?;
        Ok(())
    })
}

/// A map of points in a plane, each of a class of `names` or of none. `None` where there is nothing to draw.
///
/// ```
/// # use maskalign_core::chart::map;
/// let names = ["cat".to_string()];
/// let chart = map(&[([0.0, 1.0], Some(0)), ([2.0, 0.5], None)], &names).expect("two points");
/// assert_eq!(chart.label(), "2 images in a plane, by class: cat");
/// ```
pub fn map(points: &[([f64; 2], Option<usize>)], names: &[String]) -> Option<Chart> {
    const MARGIN: i32 = 12;
    let points = || points.iter().filter(|(point, _)| point.iter().all(|value| value.is_finite()));
    let count = points().count();
    let range = |axis: usize| {
        let values = points().map(|(point, _)| point[axis]);
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        (low.is_finite() && high.is_finite()).then_some((low, (high - low).max(f64::MIN_POSITIVE)))
    };
    let (across, up) = (range(0)?, range(1)?);
    let named = names.len() <= COLOURS.len() * MARKS && !names.is_empty();
    let label = match named {
        true => format!("{count} images in a plane, by class: {}", names.join(", ")),
        false => format!("{count} images in a plane"),
    };
    let legend = if named { 24 + 8 * names.iter().map(|n| short_name(n).chars().count()).max()? as i32 } else { 0 };
    let (width, height) = (MAP_SIZE.0 as i32 - legend - 2 * MARGIN, MAP_SIZE.1 as i32 - 2 * MARGIN);
    chart(MAP_SIZE, label, |area| {
        area.draw(&Rectangle::new([(1, 1), (width + 2 * MARGIN - 1, MAP_SIZE.1 as i32 - 1)], GREY.mix(0.5)))?;
        for (point, class) in points() {
            let share = |axis: usize, (low, span): (f64, f64)| (point[axis] - low) / span;
            let x = MARGIN + (share(0, across) * f64::from(width)).round() as i32;
            let y = MARGIN + ((1.0 - share(1, up)) * f64::from(height)).round() as i32;
            mark(area, (x, y), *class)?;
        }
        if named {
            let left = width + 2 * MARGIN + 10;
            let step = (height / names.len() as i32).min(20);
            for (class, name) in names.iter().enumerate() {
                let y = MARGIN + step / 2 + step * class as i32;
                mark(area, (left, y), Some(class))?;
                let style = text_at(13, HPos::Left, FontTransform::None);
                area.draw(&Text::new(short_name(name), (left + 9, y), style))?;
            }
        }
        Ok(())
    })
}

/// Shapes of marks: a class has a colour, and a shape where there are more classes than colours.
const MARKS: usize = 3;

fn mark(area: &Area, at: (i32, i32), class: Option<usize>) -> Drawn {
    let class = class.unwrap_or(0);
    let colour = COLOURS[class % COLOURS.len()].mix(0.8);
    match class / COLOURS.len() % MARKS {
        0 => area.draw(&Circle::new(at, 3, colour.filled()))?,
        1 => area.draw(&TriangleMarker::new(at, 4, colour.filled()))?,
        _ => area.draw(&Cross::new(at, 3, colour.stroke_width(2)))?,
    }
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
pub fn short(value: f64) -> String {
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
pub fn escape(text: &str) -> String {
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
        let chart = curves("loss & more", &[curve("a<b", points)]).expect("a chart");
        let inline = chart.inline();
        let label = "aria-label=\"loss &amp; more by epoch. a&lt;b: from 2 to 2, mean of the last epoch\"";
        assert!(inline.contains(label), "{}", &inline[..200]);
        assert!(curves("nothing", &[curve("a", Vec::new())]).is_none());
    }

    fn curve(name: &str, points: Vec<(f64, f64)>) -> Curve {
        Curve { name: name.to_owned(), points, end: End::MeanOfEpoch }
    }

    #[test]
    fn what_stands_for_the_end_is_no_single_batch() {
        // Four steps an epoch, the last of them an outlier.
        let points: Vec<(f64, f64)> = (0..12).map(|i| (f64::from(i) / 4.0, if i == 11 { 5.0 } else { 1.0 })).collect();
        let loss = curve("loss", points);
        assert_eq!(loss.at_end(), Some(2.0));
        let label = curves("Loss", &[loss]).expect("a chart").label;
        assert!(label.ends_with("from 1 to 2, mean of the last epoch"), "{label}");
    }

    #[test]
    fn an_axis_says_zero_and_no_round_off() {
        let rate = curve("rate", (0..=10).map(|i| (f64::from(i), 1e-4 * f64::from(10 - i))).collect());
        let file = curves("Rate", &[rate]).expect("a chart").file();
        assert!(file.contains("\n0\n") && !file.contains("e-2"), "{file}");
    }

    #[test]
    fn names_stand_below_the_curves() {
        let names: Vec<String> = (0..6).map(|i| format!("a phase of a step {i}")).collect();
        let many: Vec<Curve> = names.iter().map(|name| curve(name, vec![(0.0, 1.0), (1.0, 2.0)])).collect();
        let file = curves("Seconds", &many).expect("a chart").file();
        assert!(file.contains("height=\"366\""), "three rows of two names");
        for name in &names {
            // Before it comes the title of the file, which names all of them too.
            let (before, _) = file.rsplit_once(name.as_str()).expect("its name");
            let (_, element) = before.rsplit_once("<text").expect("an element of text");
            let y = element.split(" y=\"").nth(1).and_then(|rest| rest.split('"').next()?.parse::<f64>().ok());
            let y = y.expect("a place");
            assert!(y > f64::from(SIZE.1), "{name} at {y}");
        }
    }

    /// The rectangles of an element's cells, by their opacity in per cent.
    fn cells(file: &str) -> Vec<f64> {
        let filled = file.lines().filter(|line| line.starts_with("<rect") && line.contains("fill=\"#0072B2\""));
        let opacity = |line: &str| -> Option<f64> {
            let value: f64 = line.split_once("opacity=\"")?.1.split('"').next()?.parse().ok()?;
            Some((100.0 * value).round())
        };
        filled.filter_map(opacity).collect()
    }

    #[test]
    fn a_matrix_is_dark_where_its_rows_are() {
        let names = ["one", "a name that is too long for it", "three"].map(String::from);
        let chart = confusion(&names, &[vec![9, 1, 0], vec![0, 20, 0], vec![5, 0, 5]]).expect("a chart");
        assert_eq!(chart.label(), "Confusion matrix of 3 classes: 85 % on the diagonal");
        let file = chart.file();
        assert_eq!(cells(&file), [54.0, 6.0, 60.0, 30.0, 30.0], "empty cells are not drawn");
        assert!(file.contains("a name that is ...") && file.contains("taken for"));
        let many: Vec<String> = (0..=MOST_CLASSES).map(|class| class.to_string()).collect();
        assert!(confusion(&many, &vec![vec![1; many.len()]; many.len()]).is_none());
    }

    #[test]
    fn a_map_shows_every_point_within_its_frame() {
        let points: Vec<_> = (0..50u8).map(|i| ([f64::from(i), f64::from(i % 7)], Some(usize::from(i % 9)))).collect();
        let names: Vec<String> = (0..9).map(|class| format!("class {class}")).collect();
        let file = map(&points, &names).expect("a chart").file();
        // Seven colours of circles, two of triangles; each class once more in the legend.
        let (circles, triangles) = (file.matches("<circle").count(), file.matches("<polygon").count());
        let of = |from: usize, to: usize| points.iter().filter(|p| (from..to).contains(&p.1.unwrap())).count();
        assert_eq!((circles, triangles), (of(0, 7) + 7, of(7, 9) + 2));
        let coordinate = |line: &str, name: &str| -> i32 {
            line.split_once(&format!("{name}=\"")).unwrap().1.split('"').next().unwrap().parse().unwrap()
        };
        for line in file.lines().filter(|line| line.starts_with("<circle")) {
            assert!((0..560).contains(&coordinate(line, "cx")) && (0..400).contains(&coordinate(line, "cy")), "{line}");
        }
        assert!(map(&[], &names).is_none() && map(&[([f64::NAN, 0.0], None)], &[]).is_none());
    }
}
