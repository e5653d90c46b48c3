//! Reads single fields of a stored saga event, for readers that do not need the whole event.

use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};

/// The fields that the events of sagas share. A reader names the types of the fields that it needs. The other fields
/// are skipped: [`IgnoredAny`] stores nothing.
///
/// ```
/// use annals::saga::{CurrentStep, Glimpse};
///
/// let event = r#"{"reply": {}, "progress": {"status": "running", "step": "hold room"}}"#;
/// let glimpse: Glimpse<CurrentStep> = Glimpse::of(event)?;
/// assert_eq!(glimpse.progress.step, "hold room");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Deserialize)]
pub struct Glimpse<P = IgnoredAny, S = IgnoredAny, F = IgnoredAny> {
    /// The progress after the event: a [`Progress`](super::Progress), or a part of it such as [`CurrentStep`].
    pub progress: P,
    /// The commands that the saga sends: a list of [`Command`](super::Command), empty if the event sends none.
    #[serde(default)]
    pub send: S,
    /// The [`Fault`](super::Fault) that the event describes: an `Option`.
    #[serde(default)]
    pub fault: F,
}

/// The part of the progress that names the current step.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct CurrentStep {
    /// The name of the step.
    pub step: String,
}

impl<P, S, F> Glimpse<P, S, F>
where
    P: DeserializeOwned,
    S: DeserializeOwned + Default,
    F: DeserializeOwned + Default,
{
    /// Reads the data of a saga event of any type.
    ///
    /// # Errors
    /// Fails if the event has no progress, or if a field has another form.
    pub fn of(data: &str) -> serde_json::Result<Self> {
        serde_json::from_str(data)
    }
}
