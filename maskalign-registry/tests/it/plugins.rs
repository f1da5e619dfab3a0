//! What the registry reports about its components, and what it refuses.

use maskalign_registry::{
    Code, Entry, Kind, KindTag, MaskerTag, Refusal, Registry, Slot, for_each_kind, plugin::nearest, tag_named,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::components::registry;

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[test]
fn two_plugins_of_one_name_are_refused_naming_both_crates() {
    static FIRST: Entry = Entry::of::<Nothing>(Kind::Masker, "lattice", &()).package("one");
    static SECOND: Entry = Entry::of::<Nothing>(Kind::Masker, "lattice", &()).package("other");
    static ELSEWHERE: Entry = Entry::of::<Nothing>(Kind::Loss, "lattice", &()).package("third");
    let refusal = Registry::from_entries([&SECOND, &ELSEWHERE, &FIRST]).expect_err("two of a name");
    assert_eq!(
        refusal.to_string(),
        "the masker `lattice` is registered twice, by the crates `one` and `other`: \
         rename one, or depend on only one of them"
    );
    // One name in two kinds is two components.
    assert!(Registry::from_entries([&FIRST, &ELSEWHERE]).is_ok());
}

#[test]
fn components_are_listed_by_kind_and_name() {
    let names: Vec<&str> = registry().of_kind(Kind::Masker).map(|entry| entry.name).collect();
    assert_eq!(names, ["attention", "block", "multi_block", "random"]);
    let addresses: Vec<(Kind, &str)> = registry().entries().map(|e| (e.kind, e.name)).collect();
    assert!(addresses.is_sorted());
}

#[test]
fn a_component_is_found_by_its_address_or_by_a_unique_name() {
    let found = |address: &str| registry().find(address).map(Entry::address);
    assert_eq!(found("masker.attention"), Ok("masker.attention".to_owned()));
    assert_eq!(found("attention"), Ok("masker.attention".to_owned()));
    assert_eq!(found("cosine"), Err(vec!["loss.cosine".to_owned(), "schedule.cosine".to_owned()]));
    assert_eq!(found("masker.atention"), Err(vec!["masker.attention".to_owned()]));
    assert_eq!(found("teacher.smooth_l1"), Err(vec!["loss.smooth_l1".to_owned()]));
    assert_eq!(found("zzzzzzzz"), Err(Vec::new()));
}

#[test]
fn only_similar_names_are_suggested() {
    let known = ["drop_path", "positions", "cls_token", "warmup_epochs", "epochs"];
    for (written, expected) in [
        ("drop_pth", vec!["drop_path"]),
        ("path_drop", vec!["drop_path"]),
        ("Drop_Path", vec!["drop_path"]),
        ("epoch", vec!["epochs", "warmup_epochs"]),
        ("zebra", vec![]),
        ("", vec![]),
    ] {
        assert_eq!(nearest(written, known), expected, "{written}");
    }
}

#[test]
fn options_say_what_may_be_written() {
    let entry = registry().get(Kind::Masker, "attention").expect("registered");
    let options = registry().options(entry);
    let names: Vec<&str> = options.iter().map(|option| option.name.as_str()).collect();
    assert_eq!(names, ["teacher", "ratio", "visible"]);
    assert!(options[0].required && !options[1].required);
    assert_eq!(options[1].expected, "a number of at least 0 and below 1, or {from, to, shape}");
    assert_eq!(options[1].description, "Share of patches hidden.");
    let crop = registry().get(Kind::Transform, "random_resized_crop").expect("registered");
    assert_eq!(registry().options(crop)[1].expected, "a list of 2, each a number from 0 to 1");
    let flip = registry().get(Kind::Transform, "horizontal_flip").expect("registered");
    assert_eq!(registry().options(flip)[0].default, Some(json!(0.5)));
    let stage = registry().get(Kind::Stage, "pretrain").expect("registered");
    let masker = registry().options(stage).into_iter().find(|option| option.name == "masker");
    assert_eq!(masker.and_then(|masker| masker.kind), Some("masker"));
}

#[test]
fn what_is_said_of_an_option_ends_before_an_example_in_rust() {
    /// A part, on
    /// two lines.
    ///
    /// ```
    /// assert_eq!(1 + 1, 2);
    /// ```
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Part {}
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Whole {
        part: Part,
    }
    static WHOLE: Entry = Entry::of::<Whole>(Kind::Masker, "whole", &());
    let registry = Registry::from_entries([&WHOLE]).expect("one entry");
    assert_eq!(registry.options(&WHOLE)[0].description, "A part, on two lines.");
}

#[test]
fn the_example_of_every_component_parses_and_decodes() {
    for entry in registry().entries() {
        let faults = registry().faults(entry);
        let about_examples: Vec<&String> = faults.iter().filter(|fault| fault.contains("example")).collect();
        assert!(about_examples.is_empty(), "{about_examples:#?}");
    }
}

#[test]
fn faults_list_everything_that_a_registration_lacks() {
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Careless {
        cell: u32,
    }
    static CARELESS: Entry = Entry::of::<Careless>(Kind::Masker, "Careless", &()).example("{ type: Careless, cel: 2 }");
    let registry = Registry::from_entries([&CARELESS]).expect("one entry");
    let faults = registry.faults(&CARELESS).join("\n");
    for fragment in [
        "not snake_case",
        "no summary",
        "crate is not named",
        "`cell` has no description",
        "the example is refused",
        "did you mean `cell`?",
    ] {
        assert!(faults.contains(fragment), "{fragment} in\n{faults}");
    }
}

#[test]
fn a_struct_that_refuses_a_value_is_blamed_at_its_option() {
    #[derive(Serialize, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Even {
        /// Side in patches.
        #[serde(deserialize_with = "even")]
        cell: u32,
    }
    fn even<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let cell = u32::deserialize(deserializer)?;
        if cell % 2 == 0 { Ok(cell) } else { Err(serde::de::Error::custom("must be even")) }
    }
    static EVEN: Entry = Entry::of::<Even>(Kind::Masker, "even", &());
    let registry = Registry::from_entries([&EVEN]).expect("one entry");
    let report = registry.component(Kind::Masker, "even.yaml", "type: even\ncell: 3\n").expect_err("odd");
    let place = report.0[0].place().expect("a place").to_string();
    assert_eq!((report.0[0].code, place.as_str()), ("refused", "even.yaml:2:7"));
    assert!(report.0[0].message.ends_with("must be even"), "{report}");
}

#[test]
fn refusals_carry_their_path_upwards() {
    let refusal = Refusal::new("ratio", "hides all patches").help("lower it");
    let refusal = refusal.under("masker").under("pretrain");
    assert_eq!(refusal.path, ["pretrain", "masker", "ratio"]);
    assert_eq!(refusal.to_string(), "`pretrain.masker.ratio`: hides all patches (lower it)");
}

#[test]
fn a_refusal_that_follows_from_another_says_so_to_programs() {
    let plain = Refusal::new("weights", "no such stage");
    assert_eq!(plain.code(), &Code::Invalid);
    let refusal = plain.clone().unresolved(Kind::Stage, "warm").help("name another").under("student").under("pretrain");
    assert_eq!(refusal.code(), &Code::Unresolved { kind: Kind::Stage, name: "warm".to_owned() });
    let was_refused = |name: &str| name == "warm";
    assert!(refusal.follows_from(Kind::Stage, was_refused));
    assert!(!refusal.follows_from(Kind::Stage, |_| false));
    assert!(!refusal.follows_from(Kind::Teacher, was_refused));
    assert!(!plain.follows_from(Kind::Stage, |_| true));
}

/// Another crate expands the table of kinds, from items and inside of functions.
#[test]
fn the_table_of_kinds_can_be_expanded_elsewhere() {
    fn tag_of(kind: Kind) -> std::any::TypeId {
        macro_rules! tags {
            ($($kind:ident $name:ident $tag:ident $plural:literal $description:literal;)*) => {
                match kind { $(Kind::$kind => std::any::TypeId::of::<maskalign_registry::$tag>(),)* }
            };
        }
        for_each_kind!(tags)
    }
    macro_rules! names {
        ($($kind:ident $name:ident $tag:ident $plural:literal $description:literal;)*) => {
            const NAMES: &[(&str, Kind)] = &[$((stringify!($name), <tag_named::$name as KindTag>::KIND),)*];
        };
    }
    for_each_kind!(names);
    assert_eq!(NAMES.len(), Kind::ALL.len());
    for (name, kind) in NAMES {
        assert_eq!((kind.name(), Kind::from_name(name)), (*name, Some(*kind)));
    }
    assert_eq!(tag_of(Kind::Masker), std::any::TypeId::of::<MaskerTag>());
    let _: Slot<tag_named::masker> = Slot::<MaskerTag>::new("random");
}
