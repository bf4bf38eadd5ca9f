"""Short fables and tales from plots we wrote, for the chat tune: simple English, on topic, finished.

The collections hold some 400 fables, too few to teach a 26 M parameter model that a story keeps to the animals it was
asked for and ends. Each plot is text with alternatives `{this|that}` and slots `<A>` (bare), `<aA>` (with its article);
millions of wordings each. Owns plots and their expansion; a story says which characters it is about.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

POOLS: dict[str, str] = {
    "hunter": "fox wolf lion bear hawk eagle cat snake owl weasel",
    "prey": "mouse hare lamb hen frog sparrow goose rabbit squirrel duck kid pigeon",
    "big": "lion bear ox bull horse elephant stag wolf camel",
    "small": "mouse ant bee sparrow frog wren beetle snail lizard hedgehog cricket",
    "bird": "crow jay sparrow dove swallow magpie cock goose owl",
    "any": "fox wolf lion bear cat dog ox ass goat hare frog mouse crow owl sparrow hen goose squirrel hedgehog tortoise "
    "badger otter sheep pig horse stork heron monkey",
    "worker": "ant bee squirrel mouse beaver hedgehog ox",
    "idler": "grasshopper cricket butterfly frog hare fly jay",
    "slow": "tortoise snail hedgehog ox toad",
    "fast": "hare horse deer dog fox hawk rabbit",
    "farm": "goat|sheep|lamb|calf|foal|pony|goose|duck|pig|donkey|dog",
    "sea": "dolphin|seal|turtle|young whale|otter|swan|porpoise",
    "animal": "fox|wolf|lion|bear|cat|dog|ass|goat|hare|frog|mouse|crow|owl|sparrow|hen|goose|squirrel|hedgehog|tortoise|badger|"
    "otter|sheep|pig|horse|stork|heron|monkey|rabbit|donkey|duck|swan|eagle|hawk|raven|magpie|jay|dove|pigeon|robin|wren|lark|"
    "nightingale|peacock|turkey|rooster|cock|lamb|ram|kid|cow|ox|bull|calf|mule|camel|elephant|tiger|leopard|panther|hyena|"
    "jackal|deer|stag|fawn|elk|boar|mole|rat|weasel|stoat|ferret|beaver|bat|toad|newt|lizard|snake|crocodile|turtle|snail|crab|"
    "lobster|fish|trout|pike|dolphin|whale|seal|walrus|penguin|gull|pelican|parrot|ostrich|crane|kangaroo|koala|panda|giraffe|"
    "zebra|hippo|rhino|gorilla|ape|llama|yak|lynx|puma|polar bear|kitten|puppy|piglet|duckling|chick|ant|bee|wasp|beetle|"
    "butterfly|moth|cricket|grasshopper|ladybird|spider|worm|caterpillar|dragonfly|dragon|unicorn|dinosaur|hamster|raccoon|skunk",
    "toy": "lamp|clock|teapot|kite|boat|drum|umbrella|lantern|bell|music box|doll|tin soldier|teddy bear|spinning top|ball|train|"
    "cup|mirror|key|book|pencil|chair|spoon|candle|hat|shoe|button|fiddle|flute|trumpet|piano|bicycle|sledge|wheelbarrow|"
    "snow globe|marble|whistle|compass|globe|basket|broom|kettle|mug|jug|jar|bottle|ring|watch|pocket watch|puppet|robot|"
    "rocking horse|toy car|paper boat|telescope|typewriter|camera|radio|scarf|glove|mitten|blanket|pillow|vase|flowerpot|bucket|"
    "stone|shell|feather|pumpkin|potato|apple|cake|cookie|sandwich|banana|balloon|skateboard|rocket|computer|telephone",
    "useful": "lighthouse|lantern|bell|boat|lamp|windmill|clock|train|engine|tugboat|bridge|tower|ship|tractor|truck|bus",
    "season": "spring|summer|autumn|winter",
    "food": "piece of cheese|loaf of bread|fat plum|honey cake|bunch of grapes|piece of meat|ripe pear|apple pie|pot of honey|"
    "sausage|pancake|pudding|nut cake|cherry tart|melon|jar of jam|gingerbread heart",
    "fruit": "grapes|cherries|apples|plums|pears|figs",
    "place": "forest|meadow|valley|mountain|river bank|farm|marsh|orchard|lake|jungle|village|hill|garden|moor|wood",
    "name": "Hans|Peter|Jack|Martin|Tom|Ivan|Conrad|Robin|Ben|Sam|Leo|Max|Oliver|Henry|Will|Charlie|Noah|Finn|Theo|Paul|David|"
    "Daniel|Adam|Simon|Oscar|Felix|Hugo|James|John|George|Edward|Arthur|Harry|Luke|Mark|Philip|Anton|Emil|Jonas|Lucas|Omar|Ali|"
    "Ravi|Kenji|Diego|Marco|Pablo|Pierre|Karl|Otto",
    "girl": "Greta|Anna|Mary|Elsa|Rose|Clara|Nell|Marta|Lily|Emma|Lucy|Alice|Sophie|Ella|Mia|Ada|Ruby|Daisy|Molly|Kate|Jane|"
    "Julia|Nora|Ida|Eva|Lena|Sara|Hannah|Ruth|Grace|Ivy|Maya|Zoe|Chloe|Amelia|Olivia|Charlotte|Flora|Heidi|Ingrid|Katya|Leila|"
    "Aisha|Mei|Yuki|Rosa|Carmen|Lola|Marie|Polly",
    "metal": "golden|silver|copper|glass|crystal",
    "thing": "ring|bell|key|cup|comb|lamp|ball|mirror",
    "trade": "woodcutter|miller|shepherd|tailor|baker|weaver|shoemaker|gardener|farmer|fisherman|soldier|potter|carpenter|"
    "blacksmith|sailor|hunter|merchant|painter|clockmaker|cook|musician",
    "ruler": "king|queen|duke",
    "colour": "green|red|yellow|blue|purple|silver",
}
# What a slot of training/plots.txt is filled from when its header does not say
POOL_OF = {"A": "animal", "B": "animal", "C": "animal", "D": "animal", "O": "toy", "F": "food", "P": "place", "T": "trade",
           "N": "name", "G": "girl", "K": "colour", "M": "metal", "W": "thing", "S": "season"}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    slots: dict[str, str]  # slot -> pool
    text: str
    morals: tuple[str, ...] = ()  # none: a tale, not a fable
    about: tuple[str, ...] = ("A", "B")  # slots a request may name
    questions: tuple[tuple[str, str], ...] = ()
    short: str = ""  # the story in a sentence


FABLES = (
    Plot({"A": "big", "B": "small", "P": "place"}, """\
{One hot day|One morning|Once upon a time} <aA> {was sleeping|lay asleep} {in the shade|under a tree} by the <P>, when <aB> {ran over his foot|fell from a leaf on to his nose|woke him with her song}. The <A> {awoke in a rage|opened his eyes and growled} and {caught her|held her fast}.

"{Please|Pray}, let me go," {said|cried} the <B>, "and {some day|one day} I will {repay your kindness|do you a good turn}." The <A> {laughed|was amused} to think that {so small a creature|anything so little} could {ever help him|be of use to him}; but {he was not hungry|he was in a good temper}, and he {let her go|opened his paw and set her free}.

{Not long afterwards|A few days later} the <A> {was caught in a hunter's net|fell into a net of strong ropes}, and {the more he struggled, the tighter it grew|he could not get free}. The <B> {heard his cries|heard him roaring} and {came at once|hurried to the place}. All night long she {worked at the ropes|gnawed and pulled at the knots}, {until|till} {at last they gave way|one by one they broke}, and {in the morning|before the hunter came} the <A> was free.

"You laughed at me once," said the <B>, "but now you see that even {a small friend|the smallest} can help {the great|a great one}.\"""",
         ("Little friends may prove great friends.", "No kindness is ever wasted.", "Even the small can help the great.")),
    Plot({"A": "fast", "B": "slow", "P": "place"}, """\
{There was once|In the <P> lived} <aA> {who was always boasting of his speed|who laughed at everyone slower than himself}. One day he {met|saw} <aB> {on the road|by the <P>} and {began to mock her|made fun of her}. "{How slowly you go|What short legs you have}!" he said. "{Do you ever get anywhere|Shall you be home before winter}?"

"I get there {sooner than you think|in my own time}," {answered|replied} the <B>. "{Let us run a race|If you like, we will race} to the {old oak|mill|bridge|well}, and {we shall see|then you will see}."

The <A> {laughed|thought this a great joke}, but he agreed. Off he went like the wind, and {was soon out of sight|left her far behind}. "{There is plenty of time|I have no need to hurry}," he {said to himself|thought}, and he {lay down in the grass and fell asleep|stopped to eat and to play and at last to sleep}. The <B> {went on and on|walked steadily on}, {slowly but without stopping|step by step}. When the <A> {woke|awoke}, {the sun was low|it was evening}. He {ran as fast as he could|jumped up and ran}, but {when he came to the end|there at the end of the road} the <B> {was already there|was sitting quietly, waiting for him}.""",
         ("Slow and steady wins the race.", "Boasting does not win the race.", "He who never stops will arrive.")),
    Plot({"A": "hunter", "B": "bird", "F": "food", "P": "place"}, """\
<aB!> {had found|had stolen} a <F>, and {flew up into a tree|sat on a branch} {to eat it|to enjoy it}. <aA!> {was passing by|came along the road} and {saw her|smelt it}. He {was very hungry|had eaten nothing all day}, and {he thought|he said to himself}, "{That would taste good|How can I get it}?"

So he {sat down under the tree|looked up} and {said|called out}, "{Good morning|Good day}, {fair lady|Mistress <B>}! How {beautiful|bright} your feathers are! {I have never seen such eyes|How your eyes shine}! {If only you could sing|If your voice is as fine as your looks}, you would be the queen of {all the birds|the whole <P>}."

The <B> was {so pleased|filled with pride}. She {wished to show|wanted him to hear} that she could sing, and she {opened her beak wide|opened her mouth}. {At once|In a moment} the <F> {fell to the ground|dropped}, and the <A> {snapped it up|caught it and ate it}.

"Thank you," he said. "{Your voice is well enough|You sing very well}, but {you have very little sense|you should learn not to listen to everyone}.\"""",
         ("Do not trust flatterers.", "Sweet words often hide a selfish wish.", "He who listens to flattery will pay for it.")),
    Plot({"A": "idler", "B": "worker", "P": "place"}, """\
All through the {warm|long} summer <aA> {sang and danced|played in the sun} {in the <P>|from morning to night}. {Near by|Close to him} lived <aB>, who {worked hard every day|was always busy}, {carrying food to her house|filling her store for the winter}.

"{Why do you work so hard|Why are you always so busy}?" {asked|said} the <A>. "{Come and play with me|The sun is shining. Come and sing}!"

"{Winter will come|I am thinking of the winter}," {answered|said} the <B>, "and {then there will be nothing to eat|you should do the same}."

But the <A> only {laughed|shook his head}. {Then the winter came|At last the snow fell}, and {the ground was hard as stone|there was not a leaf to be found}. {Cold and hungry|Shivering with cold}, the <A> {knocked at the door of|came to} the <B>. "{Please give me something to eat|Have you a little food for me}," he {begged|said}.

"What did you do {all summer|when the days were warm}?" asked the <B>. "I {sang|played}," said he. {"Then you have learned something," said the <B>, and she gave him a little corn. "Next summer you shall work beside me."|"Then you must now go hungry," said the <B>, and she shut the door.}""",
         ("Prepare today for the needs of tomorrow.", "It is best to prepare for the days of need.",
          "There is a time for work and a time for play.")),
    Plot({"A": "hunter", "F": "food"}, """\
<aA!> {had found|had got} a <F> and was {carrying it home in his mouth|taking it home}. {On the way|Before long} he {had to cross|came to} a {stream|river}, and {as he crossed the bridge|when he looked down into the clear water} he saw {his own shadow|himself} there. He {thought it was|took it for} another <A> with another <F>, {and a larger one|even bigger than his own}.

"{I must have that one too|Why should he have the better one}?" he {thought|said to himself}. So he {opened his mouth and sprang at it|snapped at the other with all his might}. But {as soon as he opened his mouth|at that moment} his own <F> {fell into the water|dropped with a splash} and {was carried away|sank to the bottom}. {The other was gone too|There was nothing else in the water}, and the <A> {went home with nothing at all|had to go home hungry}.""",
         ("Grasp at the shadow and you will lose the substance.", "He who wants too much may lose everything.",
          "Greed loses what it has."), ("A",)),
    Plot({"A": "any", "B": "any", "C": "hunter", "F": "food"}, """\
<aA!> and <aB> {were walking together|were travelling along a road}, when they {found|saw} a <F> {lying on the ground|in the grass}. "{I saw it first|It is mine}!" said the <A>. "{No, it is mine|But I picked it up}," said the <B>; and they {began to quarrel|quarrelled loudly}, {and neither would give way|and would not share it}.

{Just then|Before long} <aC> {came by|heard the noise and came to see}. "{My friends|Good people}," said the <C>, "{do not quarrel.|why all this noise?} {Let me be the judge|I will divide it fairly}." He {broke it in two|cut it in half}, but one part was {larger|bigger}. "{That will not do|This is not fair}," he said, and he {took a bite|bit a piece} from the larger. Then {the other was too large|the other was the bigger}, and he {bit that too|took a bite of that}. {So it went on|He went on so}, {first one and then the other|bite after bite}, {until nothing was left|till it was all gone}.

"{Now it is fair|Now you are equal}," said the <C>, and {went on his way|trotted off}. The <A> and the <B> {looked at each other|stood there} and {went home hungry|had nothing but their shame}.""",
         ("Those who quarrel may both lose.", "It is better to share than to lose all.", "While two fight, a third carries off the prize.")),
    Plot({"A": "any", "B": "hunter", "P": "place"}, """\
A young <A> {was bored|had nothing to do}, and {to amuse himself|for a joke} he {ran to his friends|ran through the <P>} and cried, "{Help! Help!|Run for your lives!} The <B> is coming!" {All the animals|His friends} {left their work|came running}, but {there was no <B> to be seen|it was not true}. The <A> {laughed till the tears ran down|only laughed at them}.

{The next day|A few days later} he {did the same again|played the same trick}, and {again they came|once more they ran to help him}, and again he laughed.

But one evening the <B> {really came|did come in earnest}. "{Help! Help!|The <B>! The <B>!}" cried the <A>. "{Come quickly|This time it is true}!" But {nobody moved|no one came}. "{He is only joking|It is his old trick}," they said. {The poor <A> had to run till he could run no more, and he lost half his tail before he was safe.|The <A> escaped only by jumping into the river, and he came home wet and ashamed.|So the <B> caught the <A>, and there was nobody to save him.}""",
         ("Nobody believes a liar, even when he tells the truth.", "He who lies for fun will not be believed in need.")),
    Plot({"A": "big", "B": "hunter", "P": "place"}, """\
<aA!> {stood by a pool|came to a pool to drink} and {looked at himself in the water|saw himself in the clear water}. "{How fine my head is|What a noble head I have}!" he {said|thought}. "{But look at my legs|But my legs}: {they are thin and ugly|I am ashamed of them, they are so thin}."

{At that moment|Just then} <aB> {sprang out of the bushes|came out of the <P>}. The <A> {ran for his life|fled}, and his {thin legs|long legs} {carried him far away|carried him so swiftly that he was soon safe}. But {in the thick wood|among the trees} his {proud head|fine head} {was caught in the branches|stuck fast between two boughs}, and {he was almost taken|only at the last moment did he pull himself free}.

"{How foolish I was|Alas}!" said the <A>. "{I despised the legs that saved me|My legs saved me, and I was ashamed of them}; and {I was proud of what almost killed me|what I was proud of was nearly my death}.\"""",
         ("What is most useful is often least praised.", "What is worth most is often valued least.")),
    Plot({"A": "hunter", "B": "prey", "P": "place"}, """\
{One day|Early one morning} <aB> {was walking through the <P>|was on her way home} when she heard {someone crying|a sound of weeping}. It was <aA> {with a thorn in his foot|caught under a fallen branch}. {At first|To begin with} she {was afraid|wished to run away}, but {she had a kind heart|she was sorry for him}. "{Hold still|Do not be afraid}," she said, and she {helped him|worked until he was free}.

"{I shall not forget this|Thank you, little friend}," said the <A>, and {he went away|they parted}.

{When winter came|Many months later} {a pack of hungry wolves|a cruel hunter with two dogs} {came to the place|found the house of the <B>}. {She had nowhere to hide|She thought that her last hour had come}. {Then|But suddenly} {out of the trees came|there came} the <A>. He {stood before her door|placed himself before her} and {showed his teeth|roared so loudly} that {they turned and ran|they all ran away}. "{One good turn deserves another|You helped me once}," said he; and from that day they were friends.""",
         ("Kindness is never wasted.", "One good turn deserves another.", "A kind deed is remembered.")),
    Plot({"A": "any", "F": "fruit"}, """\
<aA!> {was very hungry|had eaten nothing all day}. {As he went along|On his way} he {saw|came to a garden and saw} some {ripe|fine} <F> hanging {high on a wall|from a high branch}. "{How sweet they look|Those are just what I want}!" he said. He {jumped|sprang up}, but {he could not reach them|they were too high}. He {tried again and again|took a run and jumped once more}, {till he was tired out|but it was all in vain}.

{At last|Then} he {turned away|walked off} with his nose in the air. "{I did not want them at all|Who would eat such things}?" he said. "{Anyone can see that they are sour|They are not ripe, and only a fool would eat them}." A sparrow on the wall {laughed|heard him}. "{They were sweet a moment ago|They are very sweet up here}," she said.""",
         ("It is easy to despise what you cannot get.", "We often call sour what we cannot reach."), ("A",)),
    Plot({"A": "prey", "B": "hunter", "P": "place"}, """\
{There was once|In a small house lived} a mother <A> who had one {little son|young one}. "{My child|My dear}," she said, "{never go to the <P> alone|do not open the door to anyone}, for the <B> {lives there|is near}, and he {is very cunning|speaks sweetly, but his teeth are sharp}."

But {when she was gone|one day when she had gone out} the {little one|young <A>} {grew tired of waiting|thought, "What harm can it do?"}. {A soft voice called|Someone called in a sweet voice}, "{Come out and play|Come with me, and I will show you the finest clover in the world}." {He went out|So he went}, and there stood the <B>, {licking his lips|with shining eyes}.

The young <A> {ran as he had never run before|ran home with his heart beating fast}, and {slipped through a hole in the hedge|reached the door} {just in time|only a step before him}. When his mother came home, he told her everything. "{Now you know|You see}," said she, "{why I warned you|that I did not speak for nothing}.\"""",
         ("Listen to those who are older and wiser.", "Good advice is better than a sorry lesson.",
          "Beware of sweet words from a stranger.")),
    Plot({"A": "bird", "P": "place"}, """\
{One dry summer|In a year without rain} <aA> {was dying of thirst|could find no water anywhere}. {At last|After a long search} she found a {tall jug|pitcher} {beside a well|in an empty garden}, but there was {so little water in it|only a little water at the bottom} that {her beak could not reach it|she could not drink}. She {tried to push it over|pushed with all her strength}, but it was too heavy.

Then she {had a thought|sat down and thought}. She {picked up a small stone|took a pebble} and dropped it into the jug. She {dropped in another|took a second}, and another, and {with every stone|little by little} the water {rose higher|came nearer to the top}. {When the jug was almost full of stones|After many, many stones} the water {stood at the brim|came up to her}, and she {drank as much as she liked|drank, and was saved}.""",
         ("Necessity is the mother of invention.", "Wit is better than strength.", "Little by little does the trick."), ("A",)),
    Plot({"A": "small", "B": "hunter", "P": "place"}, """\
In the <P> lived <aB> {whom everyone feared|who did as he pleased}. {Every day|Each morning} he {chased the small animals|took what he wanted}, and {none dared to stand against him|they could do nothing, for he was strong}.

One evening an old <A> {called the others together|spoke to her friends}. "{Alone we are weak|Each of us is small}," she said, "but {there are many of us|together we are many}. {When he comes tomorrow, let nobody run|Tomorrow let us all stand side by side}."

{The next day|When the sun rose} the <B> came, {roaring|with hungry eyes}. {But nobody ran|This time they did not run}. From {every side|above and below} they came, {hundreds of them|more than he could count}, and {they bit and stung and scratched him|they made such a noise} till he {did not know where to turn|was afraid for his life}. He {fled over the hills|ran away with his tail between his legs}, and {was never seen there again|never came back}.""",
         ("Union is strength.", "Together the weak are strong.", "Many small friends are stronger than one great enemy.")),
    Plot({"A": "hunter", "B": "bird", "F": "food"}, """\
<aA!> {invited <aB> to dinner|asked <aB> to dine with him}, and {to make fun of her|for a joke} he {served the soup in a flat dish|put nothing before her but soup in a shallow plate}. {He himself lapped it up easily|The <A> could lick it up quite well}, but the <B> {could not get a drop|only wet the end of her beak}. "{I am sorry you do not like it|Is the soup not good}?" said the <A>, {and he laughed|smiling}.

The <B> {said nothing|thanked him politely}. "{You must dine with me tomorrow|Pray come to my house next week}," she said. When {the day came|he came}, {the table was laid|dinner was ready}: a <F> at the bottom of a {tall jar with a narrow neck|deep and narrow jug}. The <B> {put in her long beak and ate|dined very well}, but the <A> {could only lick the outside|could do nothing but smell it}, and {he went home hungry|had to go home with an empty stomach}.

"{I cannot complain|She has paid me in my own coin}," he {said to himself|thought on the way}.""",
         ("One bad turn deserves another.", "He who plays tricks must expect them in return.", "Treat others as you would be treated.")),
    Plot({"A": "hunter", "B": "any", "P": "place"}, """\
<aA!> {had fallen into a deep pit|fell into a well}, and {could not get out|though he jumped and jumped, he could not climb out}. {By and by|After some time} <aB> {looked over the edge|came by}. "{Dear friend|Good <B>}," cried the <A>, "{help me, and I will give you half of all I have|pull me out, and my house and all my food shall be yours too}!"

The <B> {let down a long branch|brought a rope} and {pulled with all her might|pulled until he was out}. But {as soon as he stood on the grass|when he was safe}, the <A> {laughed|shook himself}. "{I have nothing to give|What a fool you are}," he said. "{Promises made in a pit are forgotten in the sun|Who keeps a promise made in a hole}?" And {off he ran|he went away}.

{Before the year was out|In the very same month} he {fell into the pit again|was careless and fell into the same place}. {He called and called|He cried for help all day}, and the <B> {heard him|passed by}. "{I will help you|Yes, I hear you}," she said, "{when you have kept your first promise|but I know now what your word is worth}." And {he sat there three days|there he had to stay} {before the rain filled the pit and he could swim out|till he was as thin as a stick and could climb up by a root}.""",
         ("A broken promise is not forgotten.", "Keep your word, or nobody will trust it.")),
    Plot({"A": "any", "B": "any", "P": "place"}, """\
<aA!> {lived in the <P>|had a small house by the <P>}, and {every day|often} he {looked at|watched} the <B> and {sighed|was envious}. "{What an easy life she has|She is much happier than I}," he {said|thought}. {At the same time|And strange to say} the <B> {was thinking the same of him|wished that she were in his place}.

"{Let us change|Shall we change places}," said the <A>, "{only for one day|from morning till night}." {The <B> was glad|"With all my heart," said the <B>}. So {he did her work, and she did his|each went to the other's house}. But {by noon|before the day was half over} the <A> {was wet and tired and had eaten nothing he liked|could not bear it}; and the <B> {had been frightened three times|was cold and lonely, and did not know what to do}.

{When evening came|At sunset} they {met on the road|ran to meet each other}. "{Your life is harder than I thought|I will never envy you again}," said the one. "{And so is yours|Nor I you}," said the other. And {each went home happy|they were both content from that day}.""",
         ("Be content with your own lot.", "Every life has its own troubles.", "What looks easy may be hard.")),
    Plot({"T": "trade", "S": "metal", "W": "thing"}, """\
A poor <T> {was at work by the river|was crossing a bridge} when {his tools fell into the water|he dropped his only knife}. He {sat down and wept|was in despair}, for {he had no money to buy another|without it he could not earn his bread}. {Then|Suddenly} {a spirit rose out of the water|a water spirit stood before him}. "{Why do you weep|What is the matter}?" he asked, and {when he had heard|then} he dived {down|to the bottom} and {came up with|brought up} a <S> <W>. "Is this yours?"

"{No|That is not mine}," said the <T>. The spirit dived again and brought up {a knife of pure gold|a heavy bag of gold}. "{Nor is that|That is not mine either}," said the <T>. {The third time|At last} he brought up {the old knife|a plain iron knife}. "{Yes, that is mine|That is it}!" cried the <T>, {full of joy|and thanked him}.

"{You are an honest man|You have told the truth}," said the spirit, "{and you shall have all three|therefore keep them all}." When {a greedy neighbour heard of this|his neighbour heard it}, he {threw his own knife into the river|ran to the river and did the same}. But when he was shown the gold, he {cried|said}, "{That is mine|Yes, yes, it is mine}!" and {he got nothing, and lost his knife as well|the spirit went back into the water and never came up again}.""",
         ("Honesty is the best policy.", "An honest man is richer than a greedy one."), ("T",)),
    Plot({"A": "any", "B": "any", "P": "place"}, """\
{In the autumn|When the leaves began to fall} <aA> and <aB> {each built a house|set about building their houses}. The <A> {was in a hurry|wanted to be done quickly}. He {took straw and leaves|laid a few sticks together}, and {by noon|in one day} {it was finished|he was lying in the sun}. "{What, still at work|Are you not ready yet}?" he {called|said} to the <B>. "{I have time to sing|Come and rest like me}."

"{I like to do things well|A house must stand}," said the <B>, and she {went on carrying stones|fitted stone to stone}, {day after day|for a whole month}.

{Then came the great storm|One night the wind began to blow}. {It blew and it blew|It howled and it roared}, and {the straw flew away|the first house fell down in a moment}. {Wet and trembling|With chattering teeth}, the <A> {knocked at the door of the <B>|ran to the stone house}. "{Come in|There is room for two}," said the <B>, {for she was kind|and made a place for him by the fire}; "{and in the spring I will show you how to build|but next year you will carry stones with me}.\"""",
         ("What is done in haste is soon undone.", "What is worth doing is worth doing well.")),
    Plot({"A": "any", "B": "hunter", "P": "place"}, """\
<aA!> was {always talking of his courage|a great boaster}. "{I am not afraid of anything|If a <B> came here}," he would say, "{I would chase him away|not even of the <B>. Let him come}!" And the {young animals|others} {listened with open mouths|thought him a hero}.

One {evening|day}, while he {was telling his stories|was speaking so}, {something rustled in the leaves|there was a noise in the bushes}. "{The <B>|It is the <B>}!" {cried somebody|someone whispered}. {In a moment|Before anyone could turn round} the <A> {was at the top of a tree|had crept under a stone}, {shaking all over|with his eyes shut}.

Out of the leaves came {a small beetle|a very old tortoise|a little wren}. "{Good evening|What is the matter}," said {she|the newcomer}. "{Where is your hero|Why does he hide}?" Then everyone laughed, and the <A> {did not speak of his courage again|went home quietly and boasted no more}.""",
         ("Deeds, not words.", "It is easy to be brave when danger is far away.", "Boasters are often cowards."), ("A", "B")),
    Plot({"T": "trade", "A": "bird"}, """\
A <T> and his wife {had|were so lucky as to have} <aA> that {laid a golden egg every day|gave them a golden feather each morning}. {They sold the gold|With it they bought bread and clothes}, and {wanted for nothing|lived very well}.

But {they were not content|soon it was not enough for them}. "{One a day is so little|Why must we wait}?" said {the wife|the <T>}. "{She must be full of gold inside|There must be a great lump of gold within her}. {Let us take it all at once|Then we should be rich in a day}." So they {killed the poor bird|took a knife and killed her}, and {looked|cut her open}. {But inside she was|And what did they find? She was} {just like any other <A>|exactly like all the others}. {Now they had neither gold nor bird|There was no gold, and there never would be any again}, and {they were soon as poor as before|they wept for their folly}.""",
         ("Much wants more and loses all.", "Greed often destroys what it lives by."), ("T", "A")),
)  # fmt: skip

TALES = (
    Plot({"K": "ruler", "G": "girl", "C": "colour", "P": "place", "S": "metal", "W": "thing"}, """\
{Once upon a time|Long ago} there was a {princess|king's daughter} named <G>, who {lived in a castle near the <P>|had a kind heart and was afraid of nothing}. {One day|One winter} a {great|terrible} <C> dragon {came flying over the hills|came to that country}, and {the people hid in their houses|everyone was afraid}. {Every night|Each evening} it {roared so loudly that nobody could sleep|sat upon the mountain and roared}.

The king {promised half his kingdom|sent out his knights}, {but nobody could drive it away|but they all came back with burnt cloaks}. "{Let me go|I will speak with it}," said <G>. "{Perhaps nobody has asked it what it wants|No one has spoken to it yet}." {The king wept|Her father would not hear of it}, but {she went|in the night she took a lantern and went} up the mountain alone.

The dragon {opened one eye|lifted its great head}. "{Are you not afraid|Have you come to kill me}?" it {asked|growled}. "No," said <G>. "{I have come to ask why you roar|Why do you roar so}?" {Then the dragon wept|A great tear fell from its eye}. "{I have lost my <S> <W>|Somebody has stolen my <S> <W>}," it said, "{and I cannot sleep without it|it was my mother's, and it is all I have}."

{Now <G> remembered|Then the princess knew} that {a knight had brought such a <W> to the castle|she had seen it in her father's treasure house}. She {ran home and fetched it|brought it the same night}. The dragon {laughed for joy|was so happy} that {the snow melted on the mountain|flowers sprang up round its feet}. {From that day|Ever after} it {guarded the land|carried the children on its back}, and {the princess|<G>} {became a wise queen|was its dearest friend}; and {they all lived happily ever after|if they are not dead, they are living there still}.""",
         about=("princess", "dragon"),
         questions=(("What was the princess called?", "<G>."), ("What colour was the dragon?", "<C!>."),
                    ("What had the dragon lost?", "Its <S> <W>."), ("Who went up the mountain?", "The princess, <G>."))),
    Plot({"N": "name", "S": "metal", "P": "place"}, """\
{There was once|Once upon a time there lived} a poor fisherman {named|called} <N>, who {lived with his wife in a hut by the sea|had nothing but a boat and a net}. One {morning|evening} he {caught|drew up in his net} a <S> fish. "{Let me go|Put me back into the sea}," said the fish, "and I will {grant you a wish|give you whatever you ask}."

<N> {was a good man|had a soft heart}. "{Go in peace|Swim home}," he said. "{I want nothing|I will ask my wife}." But when his wife heard of it, she {was angry|cried out}: "{You foolish man|What have you done}! {Go and ask for a new house|Ask at least for a house with a garden}!" So he {went down to the shore|called the fish}, and {the house stood there|when he came home, there was the house}.

{Soon it was not enough|But she was not content}. She {wanted a castle|must have a castle and servants}, and {the fish gave it|that too was given}. Then she {wished to be queen of the sea|wanted to rule the sun and the moon}. {When <N> asked for that|At this wish} {the sky grew black|the waves rose as high as a tower}. "{Go home|She has asked too much}," said the fish. {And when he came home|<N> went home}, {there stood the old hut|the castle was gone}, and his wife {was mending the net|sat at the door}. "{Well|Perhaps}," said she, "{we were happy here before|it is not so bad a house after all}." And {there they live to this day|from that time they were content}.""",
         about=("fisherman", "fish"),
         questions=(("What was the fisherman called?", "<N>."), ("What did the fisherman catch?", "A <S> fish."),
                    ("Where did the fisherman live?", "In a hut by the sea."))),
    Plot({"T": "trade", "N": "name", "P": "place", "S": "metal", "W": "thing", "A": "any"}, """\
A <T> had three sons, {and the youngest was called <N>|of whom the youngest, <N>, was thought a fool}. {When they were grown|One day} {he said to them|their father said}, "{Go out into the world|I am old and poor. Go and seek your fortune}."

{The eldest went first|First went the eldest}. {In the <P>|On the road} he met {an old woman|a little grey man}, who {asked for a piece of bread|begged him for food}. "{I have none to spare|Out of my way}," said he, and {he lost his road and came home with nothing|walked on, and was never lucky again}. {It was the same with the second|The second brother did just the same}.

Then <N> went. {He had only a crust|His mother had given him only a dry crust}, but when {he was asked|the beggar held out a hand}, he {broke it in two|gave the larger half}. "{You have a good heart|Your brothers had none}," said {the stranger|the other}; "{take this|therefore I give you this} <S> <W>. {When you are in need, touch it|Keep it well}, and {help will come|you will not be alone}."

{Not long after|That night} he {came to a castle|heard} where a princess {lay ill|could not laugh}, and {no doctor could help her|the king had promised her hand to the one who cured her}. <N> {took out the <W>|touched the <W>}, and {there came <aA>, dancing on two legs|in at the window came <aA> and bowed to the company}. The princess {opened her eyes|looked}, and {laughed aloud|began to laugh}, and {was well again|was cured}. So <N> {married her|became the king's son}, {and he sent for his father and forgave his brothers|and he never forgot to share his bread}.""",
         about=("T", "princess"),
         questions=(("What was the youngest son called?", "<N>."), ("How many sons did the <T> have?", "Three."),
                    ("What did the youngest son get?", "A <S> <W>."), ("Why was the princess cured?", "She laughed."))),
    Plot({"G": "girl", "A": "any", "B": "bird", "P": "place"}, """\
{Once upon a time|There was once} a little girl named <G> {lost her way in the great forest|who went into the forest to pick berries and lost her way}. {It grew dark|Night came}, and she {sat down under a tree and cried|was cold and afraid}.

"{Why are you crying|What is the matter, child}?" said a voice. It was <aA>. "{I cannot find my way home|I am lost}," said <G>. "{Do not weep|Come with me}," said the <A>; "{I will keep you warm tonight|you may sleep in my house}, and {in the morning we will ask the <B>|tomorrow my friend the <B> will show you the way}, for {she sees everything from above|she flies over the whole land}."

{So <G> slept|The child slept} {on soft moss|on a bed of leaves}, and {when the sun rose|early in the morning} the <B> {flew before her from tree to tree|came and called, "Follow me!"}. {Before noon|By and by} she {saw the smoke of her own house|heard her mother calling}. {How happy they were|Her mother took her in her arms}!

<G> {did not forget her friends|never forgot this}. {All that winter|Every Sunday} she {put out bread and seeds|carried a basket to the edge of the wood}, and {the <A> and the <B> came and ate|nobody in the forest went hungry}.""",
         about=("girl", "A", "B"),
         questions=(("What was the girl called?", "<G>."), ("Who found the girl in the forest?", "<aA!>."),
                    ("Who showed the girl the way home?", "The <B>."))),
    Plot({"R": "ruler", "T": "trade", "N": "name", "P": "place"}, """\
{There was once|Long ago there lived} a king {who could not sleep|who was never happy}. He had {a hundred rooms|gold and silver} and {the softest bed in the world|musicians to play for him}, but {it was all of no use|every night he lay awake}. {The wisest doctors|All the wise men} {shook their heads|gave him bitter drinks}, {and nothing helped|but he was as sad as before}.

{At last|One day} {an old woman said|a wise old woman came and said}, "{Let the king wear the shirt of a happy man|The king must spend one night in the house of a happy man}, and {he will be well|then he will sleep}." {So messengers were sent|The king himself set out}. {The rich man was afraid of thieves|They asked the rich, but the rich were afraid of thieves}; {the general was afraid of losing his war|the scholar had not read enough books}; {nobody was quite happy|no one would say that he was happy}.

{Then|In the evening} {by the <P>|at the edge of the <P>} they heard {someone singing|a merry song}. It was a <T> {named|called} <N>. "{Are you happy|My good man, are you happy}?" {they asked|said the king}. "{Why not|To be sure I am}," said <N>. "{I work all day, I eat my soup, and I sleep|I have bread enough, and a wife, and a song}." "{Give me your shirt|Then sell me your shirt}!" cried the king. {The man laughed|<N> opened his coat}: {he had none|he was so poor that he had no shirt at all}.

{Then the king laughed too|The king looked at him and began to laugh}, {for the first time in ten years|till he had to sit down}. {He ate a bowl of soup with him, and slept that night upon the straw|That night he slept on straw beside the fire}, {and he did not wake till noon|as sound as a child}.""",
         about=("king", "T"),
         questions=(("What was wrong with the king?", "He could not sleep or be happy."), ("What was the <T> called?", "<N>."),
                    ("Why could the king not have the shirt?", "The happy man had none."))),
    Plot({"N": "name", "G": "girl", "P": "place", "B": "bird", "S": "metal"}, """\
{High on a hill|On the mountain above the village} lived a giant {named Grumble|who was so big that he used a pine tree for a walking stick}. {Everyone was afraid of him|The people never went near him}, {for his voice was like thunder|because the ground shook when he walked}. But {nobody knew|the truth was} that {he was lonely|he wept at night because he had no friend}.

One day a {boy|child} {named|called} <N> {chased his kite up the hill|was looking for a lost goat}. {Suddenly|There} he {stood before the giant|saw two shoes as large as boats}. "{Go away|Who is there}!" {roared|said} the giant. <N> {trembled|was frightened}, but {he saw a tear on the giant's cheek|he looked up and saw that the giant was crying}. "{Are you sad|Why do you cry}?" {asked the boy|he asked}. "{Because everybody runs away|Nobody has ever stayed long enough to ask}," said the giant.

"I {will not run|will stay a while}," said <N>, and {they ate bread and cheese together|he taught the giant a song}. {The next day|On Sunday} he {brought his sister <G>|came back with his sister, <G>}, and {after her came all the children|soon all the children came}. The giant {carried them on his shoulders|let them slide down his arms}, and {when the river rose|when the great flood came} he {lifted the houses to dry land|stood in the water and held it back with his hands}. {Since then|From that day on} nobody {is afraid of him|has called him anything but friend}.""",
         about=("giant",),
         questions=(("What was the boy called?", "<N>."), ("What was the boy's sister called?", "<G>."),
                    ("Why was the giant sad?", "He had no friend."))),
    Plot({"G": "girl", "S": "metal", "W": "thing", "A": "any"}, """\
{An old witch|A witch} lived {in a crooked house at the end of the wood|alone in a hut of stones}. {She had stolen the voice of a girl named <G>|One night she stole the voice of a girl called <G>} and {kept it in a <S> <W>|locked it up in a <S> <W>}, {for she herself could not sing|because she wished to sing so sweetly}.

<G> {could not speak a word|could neither sing nor speak}, but {she was clever and brave|she did not despair}. {She had once saved <aA> from a trap|In the wood she met <aA>, whom she had fed all winter}, and {the <A> ran before her|it showed her the way} to the witch's house. {Through the window|There} they saw the witch {asleep by the fire|snoring in her chair}, and {the <W> hung round her neck|on the table stood the <W>}.

{The <A> crept in|Softly the <A> went in}, {took it in its mouth|seized it}, and {ran|was gone}. The witch {awoke with a scream|sprang up and ran after it}, but {she caught her foot and fell into her own pot|she tripped over her own cat and fell into the well}. <G> {broke the <W> on a stone|opened the <W>}, and {out flew her voice like a bird|her voice came back to her}. {She sang all the way home|The first word she spoke was "Thank you"}, and {the <A> lived with her to the end of its days|from that time she and the <A> were never parted}.""",
         about=("witch", "girl", "A"),
         questions=(("What was the girl called?", "<G>."), ("What had the witch stolen?", "The girl's voice."),
                    ("Where did the witch keep the voice?", "In a <S> <W>."), ("Who helped the girl?", "<aA!>."))),
)  # fmt: skip


def read_plots(text: str) -> tuple[Plot, ...]:
    """The plots of plots.txt: `@ slots`, the story, `= moral | moral`, `~ in a sentence`, `? question | answer`, `---`."""
    plots = []
    for block in text.split("\n---\n"):
        lines = block.strip().split("\n")
        if not lines[0].startswith("@"):
            continue
        header, _, about = lines[0][1:].partition("about:")
        slots = {s[0]: s[2:] or POOL_OF[s[0]] for s in header.split()}
        marked = {m: [line[1:].strip() for line in lines[1:] if line.startswith(m)] for m in "=~?"}
        story = "\n".join(line for line in lines[1:] if line[:1] not in ("=", "~", "?"))
        morals = tuple(m.strip() for line in marked["="] for m in line.split("|"))
        questions = tuple((q.strip(), a.strip()) for q, a in (line.split("|") for line in marked["?"]))
        named = tuple(about.split()) or tuple(s for s in slots if s in "ABCO" and re.search(f"<a?{s}!?>", story))
        plots.append(Plot(slots, story.strip(), morals, named, questions, marked["~"][0]))
    return tuple(plots)


PLOTS = (*FABLES, *TALES, *read_plots((Path(__file__).parent / "plots.txt").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Made:
    text: str
    moral: str  # "" for a tale
    about: tuple[str, ...]  # "fox", "boy named Hans"
    questions: tuple[tuple[str, str], ...]
    short: str


def article(noun: str) -> str:
    return ("an " if re.match("[aeio]|u(?!ni|se)", noun) else "a ") + noun


def _fill(text: str, words: dict[str, str], rng: random.Random) -> str:
    while (found := re.search(r"\{([^{}]*)\}", text)) is not None:  # innermost alternatives first
        text = text[: found.start()] + rng.choice(found[1].split("|")) + text[found.end() :]

    def slot(match: re.Match[str]) -> str:
        word = words[match[2]]
        word = article(word) if match[1] else word
        return word[0].upper() + word[1:] if match[3] else word

    text = re.sub(r"<(a?)([A-Z])(!?)>", slot, text)
    text = re.sub(r"\b([Aa]) (?=[aeio]|u(?!ni|se))", r"\1n ", text)  # "a {..} <A>" whose noun starts with a vowel
    text = re.sub(r"([.!?])\"\.", r'\1"', text)  # a sentence that ends in a quotation which has its own full stop
    return re.sub(r" +\n", "\n", text)


def make(plot: Plot, rng: random.Random, wanted: str = "") -> Made:
    """One wording of the plot; `wanted`: an animal or thing that shall be in it, if a slot's pool has it."""
    words: dict[str, str] = {}
    for slot, pool in plot.slots.items():
        choices = POOLS[pool].split("|") if "|" in POOLS[pool] else POOLS[pool].split()
        free = [c for c in choices if c not in words.values()]
        words[slot] = wanted if wanted in free and rng.random() < 0.7 else rng.choice(free)
    about = []
    for what in plot.about:  # "A", "dragon", "princess:G", "T:N"
        noun, _, name = what.partition(":")
        noun = words.get(noun, noun)
        about.append(
            f"{noun} {rng.choice(('named', 'called'))} {words[name]}" if name and rng.random() < 0.7 else noun
        )
    moral = rng.choice(plot.morals) if plot.morals else ""
    questions = tuple((_fill(q, words, rng), _fill(a, words, rng)) for q, a in plot.questions)
    return Made(_fill(plot.text, words, rng), moral, tuple(about), questions, _fill(plot.short, words, rng))
