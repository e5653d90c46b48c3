use rust_decimal::Decimal;
#[derive(Debug,Clone)] pub struct Line { pub sku: String, pub quantity: u32, pub unit_price: Decimal }
#[derive(Debug,Clone)] pub enum Invoice { Order{id:String,customer:Option<String>,lines:Vec<Line>}, Return{id:String,customer:Option<String>,lines:Vec<Line>}, Adjustment{id:String,lines:Vec<(String,i64)>} }
#[derive(Debug)] pub struct RowError; impl std::fmt::Display for RowError { fn fmt(&self,_:&mut std::fmt::Formatter<'_>)->std::fmt::Result{Ok(())} }
impl Invoice { pub fn id(&self)->&str { match self { Self::Order{id,..}|Self::Return{id,..}|Self::Adjustment{id,..}=>id } }
 pub fn skus(&self)->Box<dyn Iterator<Item=&str>+'_> { match self { Self::Order{lines,..}|Self::Return{lines,..}=>Box::new(lines.iter().map(|l|l.sku.as_str())), Self::Adjustment{lines,..}=>Box::new(lines.iter().map(|l|l.0.as_str())) } } }
pub fn generate(n:usize, seed:u64)->Vec<Invoice>{ let mut r=fastrand::Rng::with_seed(seed); (0..n).map(|i|{ let k=r.usize(1..=3); let mut skus=std::collections::BTreeSet::new(); while skus.len()<k { let u=r.f64(); skus.insert((1000f64.powf(u)) as usize); } Invoice::Order{id:format!("g{seed}-{i}"),customer:None,lines:skus.into_iter().map(|s|Line{sku:format!("sku{s}"),quantity:r.u32(1..=5),unit_price:Decimal::new(100+s as i64,2)}).collect()} }).collect() }
