#[derive(annals::Event)]
union Bits {
    whole: u32,
    half: u16,
}

fn main() {}
