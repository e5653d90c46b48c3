//! `Debug` for public types with fields that have no `Debug`, such as stores and handlers.

/// Implements `Debug` for a struct. The output shows the given fields, and indicates that the other fields are omitted.
macro_rules! debug_fields {
    ($([$($generics:tt)*])? $type:ident $(<$($argument:ident),*>)? { $($field:ident),* }) => {
        impl $(<$($generics)*>)? std::fmt::Debug for $type $(<$($argument),*>)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($type))
                    $(.field(stringify!($field), &self.$field))*
                    .finish_non_exhaustive()
            }
        }
    };
}
