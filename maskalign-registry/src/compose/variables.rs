//! `${NAME}` and `${NAME:-default}` in scalars.

use std::sync::Arc;

use crate::{
    diagnostic::{Diagnostic, Place, codes},
    wording::quoted,
    yaml::{Content, Node, Origin, Typing, resolve_plain},
};

/// Substitutes the variables in every scalar below a node.
pub(super) fn substitute_variables(node: &mut Node, env: &dyn Fn(&str) -> Option<String>) {
    match &mut node.content {
        Content::Seq(items) => items.iter_mut().for_each(|item| substitute_variables(item, env)),
        Content::Map(map) => map.values_mut().for_each(|member| substitute_variables(&mut member.value, env)),
        Content::Str(text) if text.contains('$') => {
            let Some(place) = node.origin.place().cloned() else {
                return;
            };
            match expand(text, &place, env) {
                Ok(expanded) => {
                    node.content = match (expanded.whole, node.typing) {
                        (true, Typing::Text) => resolve_plain(&expanded.text),
                        (true, Typing::Fixed) => {
                            node.typing = Typing::Option;
                            Content::Str(expanded.text)
                        }
                        _ => Content::Str(expanded.text),
                    };
                    if let Some(name) = expanded.variable {
                        node.origin = Origin::Variable { name, at: place };
                    }
                }
                Err((text, diagnostics)) => node.content = Content::Unset { text, diagnostics },
            }
        }
        _ => {}
    }
}

struct Expanded {
    text: String,
    /// The first variable in it.
    variable: Option<String>,
    /// Whether the scalar is one variable and nothing else.
    whole: bool,
}

/// Substitutes the variables of a scalar.
///
/// # Errors
/// The text with `$NAME` where a value is missing, and what is wrong.
fn expand(
    text: &str,
    place: &Place,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<Expanded, (String, Vec<Diagnostic>)> {
    let mut out = String::with_capacity(text.len());
    let mut variable = None;
    let mut diagnostics = Vec::new();
    let mut rest = text;
    // Where to look for the next `${` in the source, so that each use of a variable gets its own place.
    let mut searched = place.span.start;
    let mut pieces = 0;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        pieces += usize::from(at > 0);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            pieces += 1;
            rest = after;
            continue;
        }
        let Some(inner) = rest.strip_prefix("${") else {
            out.push('$');
            pieces += 1;
            rest = &rest[1..];
            continue;
        };
        pieces += 1;
        let (inner, after) = match inner.find('}') {
            Some(end) => (&inner[..end], &inner[end + 1..]),
            None => (inner, ""),
        };
        let closed = rest.len() > inner.len() + 2;
        let written = &rest[..inner.len() + 2 + usize::from(closed)];
        let spot = locate(place, &mut searched, written);
        rest = after;
        let (name, default) = match inner.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inner, None),
        };
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !closed || !is_name || default.is_some_and(|default| default.contains("${")) {
            let message = if !closed {
                "`${` without `}`".to_owned()
            } else if !is_name {
                format!("{} is not the name of a variable", quoted(name))
            } else {
                "a default cannot hold another variable".to_owned()
            };
            diagnostics.push(
                Diagnostic::error(codes::BAD_VARIABLE, message, spot)
                    .help("write ${NAME} or ${NAME:-default}; a literal dollar is `$$`"),
            );
            continue;
        }
        variable.get_or_insert_with(|| name.to_owned());
        match (env(name), default) {
            (Some(value), None) => out.push_str(&value),
            (Some(value), Some(_)) if !value.is_empty() => out.push_str(&value),
            (_, Some(default)) => out.push_str(default),
            (None, None) => {
                out.push_str(&format!("${name}"));
                diagnostics.push(
                    Diagnostic::error(codes::UNSET_VARIABLE, format!("the variable `{name}` is not set"), spot).help(
                        format!(
                            "set it in the environment, as in `{name}=... maskalign ...`, or give a default: ${{{name}:-default}}"
                        ),
                    ),
                );
            }
        }
    }
    pieces += usize::from(!rest.is_empty());
    out.push_str(rest);
    if diagnostics.is_empty() {
        Ok(Expanded { text: out, whole: variable.is_some() && pieces == 1, variable })
    } else {
        Err((out, diagnostics))
    }
}

/// The place of `${...}` in the source text of a scalar; the whole scalar if escapes hide it.
fn locate(scalar: &Place, searched: &mut usize, written: &str) -> Place {
    let found = scalar.source.text().get(*searched..scalar.span.end).and_then(|text| text.find(written));
    match found {
        Some(at) => {
            let start = *searched + at;
            *searched = start + written.len();
            Place { source: Arc::clone(&scalar.source), span: start..start + written.len() }
        }
        None => scalar.clone(),
    }
}
