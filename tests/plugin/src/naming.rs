//! A naming of weights: what another program calls the tensors of a vision transformer.

use maskalign_core::{
    prelude::*,
    weights::{Change, Naming, Writes},
};

register_naming!(Naming {
    key: "lattice",
    name: "Lattice",
    about: "a program that numbers layers from the stem up",
    families: &[Family::Vit],
    mark: "stem.weight",
    second_mark: None,
    tower: &[
        ("stem.*", "patch_embed.proj.*", Change::Same),
        ("summary", "cls_token", Change::ToRank(3)),
        ("places", "pos_embed", Change::ToRank(3)),
        ("top.*", "norm.*", Change::Same),
    ],
    blocks: "layers.",
    block: &[
        ("before.*", "norm1.*", Change::Same),
        ("query.*", "attn.qkv.*", Change::Third(0)),
        ("key.*", "attn.qkv.*", Change::Third(1)),
        ("value.*", "attn.qkv.*", Change::Third(2)),
        ("joined.*", "attn.proj.*", Change::Same),
        ("between.*", "norm2.*", Change::Same),
        ("wide.*", "mlp.fc1.*", Change::Same),
        ("narrow.*", "mlp.fc2.*", Change::Same),
    ],
    prefix: "",
    model: None,
    writes: Writes::Tower,
    beside: &[("steps_done", "a counter")],
});
