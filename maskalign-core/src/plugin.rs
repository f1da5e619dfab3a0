//! From a slot of a recipe to a component: the constructors that the registry stores without knowing them.

use maskalign_registry::{KindTag, Refusal, Registry, Slot};
use serde_json::Value;

/// A kind of plugin and the trait object that its components become.
pub trait Component: KindTag + Sized {
    /// What a decoded component is.
    type Object: ?Sized;
}

/// The constructor of a component: options of the recipe to the component.
pub struct Constructor<K: Component>(pub fn(Value) -> Result<Box<K::Object>, Refusal>);

/// Building the component that a slot names.
pub trait Build<K: Component> {
    /// The component.
    ///
    /// # Errors
    /// The component refuses its options, or no component of that name is registered in this binary.
    fn build(&self) -> Result<Box<K::Object>, Refusal>;
}

impl<K: Component> Build<K> for Slot<K> {
    fn build(&self) -> Result<Box<K::Object>, Refusal> {
        let registry = Registry::global().map_err(|e| Refusal::whole(e.to_string()))?;
        let entry = registry
            .get(K::KIND, &self.name)
            .ok_or_else(|| Refusal::new("type", format!("no {} is named `{}`", K::KIND, self.name)))?;
        let Constructor::<K>(construct) =
            entry.vtable.downcast_ref().expect("register! pairs every kind with its own constructor");
        construct(self.options_value())
    }
}
