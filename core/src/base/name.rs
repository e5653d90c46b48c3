//! Checks the names of all parts that store documents under their own name: subscriptions, groups, services, read
//! models and instances.

use std::collections::BTreeMap;

/// The maximum length of a name in bytes. The length is limited because the name is part of the collection name of
/// parked messages: `parked.NAME` or `parked.NAME@GENERATION`.
pub const NAME_BYTES_MAX: usize = 150;
/// The suffix of a relay's name, after its service's name. No other name may end with this suffix.
pub(crate) const RELAY: &str = ".relay";

/// Why a name is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// The documents stored under this name could be confused with the documents of another name.
    #[error("{kind} {name:?}: {reason}; choose another name")]
    Malformed {
        /// The kind of the part, such as `subscription`.
        kind: &'static str,
        /// The name, shortened if it is long.
        name: String,
        /// Why the name is not valid.
        reason: String,
    },
    /// Two parts have the same name, and would share the same checkpoints and parked messages.
    #[error(
        "{first} and {second} have the same name {name:?}, and would share checkpoints and parked messages: rename \
         one of them"
    )]
    Taken {
        /// The common name.
        name: String,
        /// The kind of the first part, such as `subscription`.
        first: &'static str,
        /// The kind of the second part.
        second: &'static str,
    },
}

/// Checks that the documents of a name cannot be confused with the documents of another name. In the ids of documents,
/// `/` precedes a lane or a topic, and `@` precedes a generation of a read model or an instance.
pub(crate) fn check(kind: &'static str, name: &str) -> Result<(), NameError> {
    let reason = if name.is_empty() {
        "the name is empty".to_owned()
    } else if name.len() > NAME_BYTES_MAX {
        format!("the name has {} bytes; the limit is {NAME_BYTES_MAX}", name.len())
    } else if let Some(character) =
        name.chars().find(|character| matches!(character, '/' | '@') || character.is_control())
    {
        format!("the name contains {character:?}, which separates a name from the rest of a key")
    } else if name.trim() != name {
        "the name begins or ends with a space".to_owned()
    } else if kind != "relay" && name.ends_with(RELAY) {
        format!("the ending {RELAY} is reserved for relays of services")
    } else {
        return Ok(());
    };
    Err(NameError::Malformed { kind, name: name.chars().take(40).collect(), reason })
}

/// The names of all parts that run in one runtime.
#[derive(Clone, Default)]
pub(crate) struct Names(BTreeMap<String, &'static str>);

impl Names {
    /// Reserves a name for a part of this kind.
    pub fn take(&mut self, kind: &'static str, name: &str) -> Result<(), NameError> {
        check(kind, name)?;
        match self.0.insert(name.to_owned(), kind) {
            Some(first) => Err(NameError::Taken { name: name.to_owned(), first, second: kind }),
            None => Ok(()),
        }
    }
}

/// The maximum length of a service name in bytes. The names of a service's topics, relays and parts contain the service
/// name and are longer. With this limit, every store and bus accepts the longer names too.
pub(crate) const SERVICE_BYTES_MAX: usize = 80;

/// Returns whether the name is valid for a service. The topics of the service contain this name, so the name must be
/// valid in topic names too.
pub(crate) fn is_service_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !name.is_empty() && name.len() <= SERVICE_BYTES_MAX && name.bytes().all(plain)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_that_collide_with_other_documents_are_refused() {
        for name in
            ["", "a/b", "a@1", "@", "/", "a\0", "a\n", " a", "a ", "mail.relay", &"x".repeat(NAME_BYTES_MAX + 1)]
        {
            assert!(matches!(check("subscription", name), Err(NameError::Malformed { .. })), "{name:?}");
        }
        let long = "x".repeat(NAME_BYTES_MAX);
        for name in
            ["order.checkout.start", "order.commands", "bank.nothing", "mail sender", "größe", "a-b_c:d#1", &long]
        {
            assert_eq!(check("subscription", name), Ok(()), "{name:?}");
        }
        assert_eq!(check("relay", "order.relay"), Ok(()));
    }

    #[test]
    fn two_parts_cannot_share_a_name() {
        let mut names = Names::default();
        names.take("subscription", "mailer").unwrap();
        names.take("subscription", "mailer2").unwrap();
        let twice = names.take("group", "mailer").unwrap_err();
        assert_eq!(twice, NameError::Taken { name: "mailer".into(), first: "subscription", second: "group" });
    }
}
