//! The actor and the tenant of a request.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// The maximum length of the name of an actor or a tenant, in bytes.
pub const PARTY_BYTES_MAX: usize = 200;

/// The name of an actor (the user, service or operator who made the request) or of a tenant (for whom the request was
/// made). The name travels with [`Metadata`](crate::Metadata) to everything that follows from the request.
///
/// A name has 1 to [`PARTY_BYTES_MAX`] bytes, and no control characters.
///
/// ```
/// use annals::event::Party;
///
/// # fn main() -> Result<(), annals::event::PartyError> {
/// assert_eq!(Party::new("user:ann")?.as_str(), "user:ann");
/// assert!(Party::new("").is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Party(Arc<str>);

/// Why a text is not the name of an actor or a tenant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} cannot name an actor or a tenant: {reason}")]
pub struct PartyError {
    /// The text, shortened if it is long.
    pub name: String,
    /// What is wrong with the text.
    pub reason: String,
}

impl Party {
    /// Checks a name.
    pub fn new(name: &str) -> Result<Self, PartyError> {
        let reason = match name {
            "" => "it is empty".to_owned(),
            name if name.len() > PARTY_BYTES_MAX => {
                format!("it has {} bytes; the limit is {PARTY_BYTES_MAX}", name.len())
            }
            name if name.chars().any(char::is_control) => "it has a control character".to_owned(),
            name => return Ok(Self(name.into())),
        };
        Err(PartyError { name: name.chars().take(40).collect(), reason })
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Party {
    type Error = PartyError;

    fn try_from(name: String) -> Result<Self, PartyError> {
        Self::new(&name)
    }
}

impl From<Party> for String {
    fn from(party: Party) -> Self {
        party.as_str().to_owned()
    }
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}
