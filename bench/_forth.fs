( The standard library of the benchmark's Forth. init reads it. )

( stack )
: nip swap drop ;   : tuck swap over ;   : 2dup over over ;   : 2drop drop drop ;
: -rot rot rot ;   : third >r over r> swap ;   : ?dup dup if dup then ;

( logic and comparison )
-1 constant true   0 constant false
: 0= 0 = ;   : not 0= ;   : 0< 0 < ;   : > swap < ;   : 0> 0 > ;   : <> = not ;   : <= > not ;   : >= < not ;
: 0<> 0= not ;   : within over - >r - r> 2dup < >r drop 0< not r> and ;   : invert -1 xor ;
: bool 0<> 1 and ;   : nand and invert ;   : nor or invert ;   : implies swap not or ;

( arithmetic )
: 1+ 1 + ;   : 1- 1 - ;   : 2+ 2 + ;   : 2- 2 - ;   : 2* 2 * ;   : 2/ 2 / ;   : negate 0 swap - ;
: abs dup 0< if negate then ;   : min 2dup > if swap then drop ;   : max 2dup < if swap then drop ;
: clamp rot min max ;   : sign dup 0< swap 0> - ;   : /mod 2dup mod -rot / ;   : */ >r * r> / ;   : even 2 mod 0= ;
: odd even not ;   : sq dup * ;   : cube dup sq * ;   : avg + 2/ ;   : divides swap mod 0= ;
: gcd begin ?dup while tuck mod repeat ;   : lcm 2dup gcd / * ;
: ** 1 swap 0 do over * loop nip ;   : fact 1 swap 1+ 1 do i * loop ;
: fib 0 1 rot 0 do tuck + loop drop ;   : sum-to dup 1+ * 2/ ;
: isqrt dup 2 < if else dup begin 2dup / over + 2/ 2dup > while nip repeat drop nip then ;
: collatz 0 swap begin dup 1 > while dup even if 2/ else 3 * 1+ then swap 1+ swap repeat drop ;
: choose 1 swap 1+ 1 do over i - 1+ * i / loop nip ;   : triangle 1+ 2 choose ;
: log2 0 swap begin 2/ dup while swap 1+ swap repeat drop ;
: digits 0 swap begin 10 / swap 1+ swap dup 0= until drop ;
: digit-sum 0 swap begin dup while dup 10 mod rot + swap 10 / repeat drop ;
: powmod >r 1 -rot begin dup while dup odd if >r tuck * r> swap r@ mod -rot then 2/ swap sq r@ mod swap repeat
  2drop r> drop ;

( bits )
: bit 1 swap lshift ;   : set-bit bit or ;   : clear-bit bit invert and ;   : test-bit rshift 1 and ;
: low32 4294967295 and ;   : low8 255 and ;   : byte-of 8 * rshift low8 ;
: popcount 0 swap begin dup while dup 1- and swap 1+ swap repeat drop ;   : parity popcount 1 and ;
: rotl32 2dup lshift low32 -rot 32 swap - rshift or ;   : rotr32 32 swap - rotl32 ;   : power-of-2 dup 1- and 0= ;
: gray dup 1 rshift xor ;   : align-up 1- tuck + swap invert and ;

( memory )
8 constant cell   : cells cell * ;   : cell+ cell + ;   : +! dup @ rot + swap ! ;
: on true swap ! ;   : off 0 swap ! ;
: inc 1 swap +! ;   : dec -1 swap +! ;   : exchange dup @ -rot ! ;   : nth cells + ;
: fill -rot 0 do 2dup i + c! loop 2drop ;   : erase 0 fill ;
: sum-bytes 0 swap 0 do over i + c@ + loop nip ;

( characters )
32 constant bl   10 constant lf   13 constant cr   9 constant tab   48 constant ch-0   65 constant ch-A
97 constant ch-a
: is-digit 48 58 within ;   : is-upper 65 91 within ;   : is-lower 97 123 within ;
: is-alpha dup is-upper swap is-lower or ;
: is-alnum dup is-alpha swap is-digit or ;   : is-space dup bl = over lf = or over cr = or swap tab = or ;
: upper dup is-lower if 32 - then ;   : lower dup is-upper if 32 + then ;   : digit-value ch-0 - ;   : as-digit ch-0 + ;
: count-digits 0 swap 0 do over i + c@ is-digit - loop nip ;
: length 0 begin 2dup + c@ while 1+ repeat nip ;

( hashing: the tables are computed here )
create crc-table 256 cells-allot
: crc-entry 8 0 do dup odd if 1 rshift 3988292384 xor else 1 rshift then loop ;
: crc-init 256 0 do i crc-entry crc-table i nth ! loop ;   crc-init
: crc-byte over xor low8 cells crc-table + @ swap 8 rshift xor ;
: crc32 4294967295 swap 0 do over i + c@ crc-byte loop nip 4294967295 xor ;
: fnv1a 2166136261 swap 0 do over i + c@ xor 16777619 * low32 loop nip ;
: djb2 5381 swap 0 do 33 * over i + c@ + low32 loop nip ;
: adler 65521 mod ;

( random numbers )
variable seed   2463534242 seed !
: random seed @ dup 13 lshift xor low32 dup 17 rshift xor dup 5 lshift xor low32 dup seed ! ;
: below random swap mod ;

( fixed point, 16 bits behind the point, and a table of sines of 1024 steps by Bhaskara's formula )
65536 constant one   205887 constant pi   : fix one * ;   : int one / ;   : f* one */ ;   : f/ one swap */ ;
: half-sine 512 mod dup 512 swap - * dup 4 * one * swap 327680 swap - / ;
create sines 1024 cells-allot
: sine-init 1024 0 do i half-sine i 512 < not if negate then sines i nth ! loop ;   sine-init
: sin 1023 and cells sines + @ ;   : cos 256 + sin ;

( vectors of two )
: v+ rot + -rot + swap ;   : dot rot * -rot * + ;   : norm2 sq swap sq + ;   : norm norm2 isqrt ;

( primes, sieved below 4096 )
create composite 512 cells-allot
: sieve-one dup sq begin dup 4096 < while 1 over composite + c! over + repeat 2drop ;
: sieve 64 2 do composite i + c@ 0= if i sieve-one then loop ;   sieve
: prime composite + c@ 0= ;   : primes-below 0 swap 2 do i prime - loop ;

( dates )
: leap dup 4 mod 0= over 100 mod 0<> and swap 400 mod 0= or ;   : year-days leap negate 365 + ;
create month-days 31 , 28 , 31 , 30 , 31 , 30 , 31 , 31 , 30 , 31 , 30 , 31 ,
: days-in-month dup 2 = if drop leap negate 28 + else nip 1- cells month-days + @ then ;
: days-before-year 1- dup 365 * over 4 / + over 100 / - swap 400 / + ;   : weekday days-before-year 7 mod ;

( units )
: inches 254 * 10 / ;   : feet 12 * inches ;   : yards 3 * feet ;   : miles 1760 * yards ;   : fahrenheit 32 - 5 9 */ ;
: celsius 9 5 */ 32 + ;   : minutes 60 * ;   : hours 60 * minutes ;   : days 24 * hours ;   : weeks 7 * days ;
1024 constant KiB   : MiB KiB * KiB * ;   : GiB KiB * MiB ;

( the characters that HTML has names for )
198 constant &AElig   193 constant &Aacute   194 constant &Acirc   192 constant &Agrave   913 constant &Alpha
197 constant &Aring   195 constant &Atilde   196 constant &Auml   914 constant &Beta   199 constant &Ccedil
935 constant &Chi   8225 constant &Dagger   916 constant &Delta   208 constant &ETH   201 constant &Eacute
202 constant &Ecirc   200 constant &Egrave   917 constant &Epsilon   919 constant &Eta   203 constant &Euml
915 constant &Gamma   205 constant &Iacute   206 constant &Icirc   204 constant &Igrave   921 constant &Iota
207 constant &Iuml   922 constant &Kappa   923 constant &Lambda   924 constant &Mu   209 constant &Ntilde
925 constant &Nu   338 constant &OElig   211 constant &Oacute   212 constant &Ocirc   210 constant &Ograve
937 constant &Omega   927 constant &Omicron   216 constant &Oslash   213 constant &Otilde   214 constant &Ouml
934 constant &Phi   928 constant &Pi   8243 constant &Prime   936 constant &Psi   929 constant &Rho
352 constant &Scaron   931 constant &Sigma   222 constant &THORN   932 constant &Tau   920 constant &Theta
218 constant &Uacute   219 constant &Ucirc   217 constant &Ugrave   933 constant &Upsilon   220 constant &Uuml
926 constant &Xi   221 constant &Yacute   376 constant &Yuml   918 constant &Zeta   225 constant &aacute
226 constant &acirc   180 constant &acute   230 constant &aelig   224 constant &agrave   8501 constant &alefsym
945 constant &alpha   38 constant &amp   8743 constant &and   8736 constant &ang   229 constant &aring
8776 constant &asymp   227 constant &atilde   228 constant &auml   8222 constant &bdquo   946 constant &beta
166 constant &brvbar   8226 constant &bull   8745 constant &cap   231 constant &ccedil   184 constant &cedil
162 constant &cent   967 constant &chi   710 constant &circ   9827 constant &clubs   8773 constant &cong
169 constant &copy   8629 constant &crarr   8746 constant &cup   164 constant &curren   8659 constant &dArr
8224 constant &dagger   8595 constant &darr   176 constant &deg   948 constant &delta   9830 constant &diams
247 constant &divide   233 constant &eacute   234 constant &ecirc   232 constant &egrave   8709 constant &empty
8195 constant &emsp   8194 constant &ensp   949 constant &epsilon   8801 constant &equiv   951 constant &eta
240 constant &eth   235 constant &euml   8364 constant &euro   8707 constant &exist   402 constant &fnof
8704 constant &forall   189 constant &frac12   188 constant &frac14   190 constant &frac34   8260 constant &frasl
947 constant &gamma   8805 constant &ge   62 constant &gt   8660 constant &hArr   8596 constant &harr
9829 constant &hearts   8230 constant &hellip   237 constant &iacute   238 constant &icirc   161 constant &iexcl
236 constant &igrave   8465 constant &image   8734 constant &infin   8747 constant &int   953 constant &iota
191 constant &iquest   8712 constant &isin   239 constant &iuml   954 constant &kappa   8656 constant &lArr
955 constant &lambda   9001 constant &lang   171 constant &laquo   8592 constant &larr   8968 constant &lceil
8220 constant &ldquo   8804 constant &le   8970 constant &lfloor   8727 constant &lowast   9674 constant &loz
8206 constant &lrm   8249 constant &lsaquo   8216 constant &lsquo   60 constant &lt   175 constant &macr
8212 constant &mdash   181 constant &micro   183 constant &middot   8722 constant &minus   956 constant &mu
8711 constant &nabla   160 constant &nbsp   8211 constant &ndash   8800 constant &ne   8715 constant &ni
172 constant &not   8713 constant &notin   8836 constant &nsub   241 constant &ntilde   957 constant &nu
243 constant &oacute   244 constant &ocirc   339 constant &oelig   242 constant &ograve   8254 constant &oline
969 constant &omega   959 constant &omicron   8853 constant &oplus   8744 constant &or   170 constant &ordf
186 constant &ordm   248 constant &oslash   245 constant &otilde   8855 constant &otimes   246 constant &ouml
182 constant &para   8706 constant &part   8240 constant &permil   8869 constant &perp   966 constant &phi
960 constant &pi   982 constant &piv   177 constant &plusmn   163 constant &pound   8242 constant &prime
8719 constant &prod   8733 constant &prop   968 constant &psi   34 constant &quot   8658 constant &rArr
8730 constant &radic   9002 constant &rang   187 constant &raquo   8594 constant &rarr   8969 constant &rceil
8221 constant &rdquo   8476 constant &real   174 constant &reg   8971 constant &rfloor   961 constant &rho
8207 constant &rlm   8250 constant &rsaquo   8217 constant &rsquo   8218 constant &sbquo   353 constant &scaron
8901 constant &sdot   167 constant &sect   173 constant &shy   963 constant &sigma   962 constant &sigmaf
8764 constant &sim   9824 constant &spades   8834 constant &sub   8838 constant &sube   8721 constant &sum
8835 constant &sup   185 constant &sup1   178 constant &sup2   179 constant &sup3   8839 constant &supe
223 constant &szlig   964 constant &tau   8756 constant &there4   952 constant &theta   977 constant &thetasym
8201 constant &thinsp   254 constant &thorn   732 constant &tilde   215 constant &times   8482 constant &trade
8657 constant &uArr   250 constant &uacute   8593 constant &uarr   251 constant &ucirc   249 constant &ugrave
168 constant &uml   978 constant &upsih   965 constant &upsilon   252 constant &uuml   8472 constant &weierp
958 constant &xi   253 constant &yacute   165 constant &yen   255 constant &yuml   950 constant &zeta
8205 constant &zwj   8204 constant &zwnj
