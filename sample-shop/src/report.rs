//! What the shop says.
